"""Parameter-efficient expert retrieval: a million experts of one neuron each.

Letters: b batch, t time, d model width, h heads, k experts per head.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.memory.reading import idle_share, table_of
from hybridlm.ffns.memory.retrieval import ProductKeys
from hybridlm.ffns.memory.table import Table, table_name, tap
from hybridlm.mixers.base import Carry, Context, Segments


class PEER(nnx.Module):
    """y = sum_h sum_{i in T_h} softmax(s_h)_i gelu(u_i . x) v_i (He, 2024, arXiv:2407.04153, section 2).

    T_h are the k experts with the best scores s_h of the head's query, by keys that heads share; u and v are the rows
    of two tables.
    """

    def __init__(self, cfg: config.PEER, context: Context, rngs: nnx.Rngs):
        self.down, self.up = names(cfg, context)
        self.retrieval = ProductKeys(cfg, cfg.num_heads, cfg.key_dim, cfg.query_norm, context, rngs, shared_keys=True)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        down, up = table_of(given, self.down), table_of(given, self.up)
        experts, weights, aux = self.retrieval(x, segments.ids != 0, training=given.training)
        experts, weights = (a.reshape(*a.shape[:2], -1) for a in (experts, weights))  # b t hk
        hidden, asked_down = down.scores(experts, x, given)
        y, asked_up = up.lookup(experts, weights.astype(x.dtype) * jax.nn.gelu(hidden), given)
        return y, aux | asked_down | asked_up, carry

    @staticmethod
    def shared(cfg: config.PEER, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        d, init = context.width, nnx.initializers.normal(context.width**-0.5)
        reads = cfg.num_heads * cfg.top_k
        down, up = names(cfg, context)
        return {
            down: Table(down, cfg.num_rows, d, cfg, context, rngs, init, reads, weighted=False),
            up: Table(up, cfg.num_rows, d, cfg, context, rngs, init, reads),
        }

    @staticmethod
    def taps(cfg: config.PEER, context: Context, batch: int, length: int) -> dict[str, Array]:
        down, up = names(cfg, context)
        return {
            down: tap(context, batch, length, cfg.num_heads * cfg.top_k),
            up: tap(context, batch, length, context.width),
        }

    @staticmethod
    def flops(cfg: config.PEER, context: Context) -> int:
        experts = 4 * cfg.num_heads * cfg.top_k * context.width
        return experts + ProductKeys.flops(cfg, cfg.num_heads, cfg.key_dim, context)

    @staticmethod
    def idle_parameters(cfg: config.PEER, context: Context) -> int:
        return idle_share(cfg, context, cfg.num_heads * cfg.top_k, 2 * context.width)


def names(cfg: config.PEER, context: Context) -> tuple[str, str]:
    """Of the tables of u and v."""
    name = table_name(cfg, context)
    return f"{name}_down", f"{name}_up"
