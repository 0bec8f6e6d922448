"""Product-key memories: a table of values, of which each token gets a few, weighted.

Letters: b batch, t time, d model width, h heads, k rows per head, v row width.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.memory.reading import idle_share, table_of
from hybridlm.ffns.memory.retrieval import ProductKeys
from hybridlm.ffns.memory.table import Table, table_name, tap
from hybridlm.layers import Linear, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments
from hybridlm.sharding import constrain


class ProductKeyMemory(nnx.Module):
    """y = sum_h sum_{i in T_h} softmax(s_h)_i V_i, T_h the k rows with the best scores s_h of the head's query.

    All heads read the same values V (Lample et al., 2019, arXiv:1907.05242, section 3).
    """

    def __init__(self, cfg: config.ProductKeyMemory, context: Context, rngs: nnx.Rngs):
        self.name = table_name(cfg, context)
        self.retrieval = ProductKeys(cfg, cfg.num_heads, cfg.key_dim, cfg.query_norm, context, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        y, aux = read_values(self.retrieval, self.name, x, segments, given)
        return y, aux, carry

    @staticmethod
    def shared(cfg: config.ProductKeyMemory, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return value_table(cfg, cfg.num_heads, context.width, context, rngs)

    @staticmethod
    def taps(cfg: config.ProductKeyMemory, context: Context, batch: int, length: int) -> dict[str, Array]:
        return {table_name(cfg, context): tap(context, batch, length, context.width)}

    @staticmethod
    def flops(cfg: config.ProductKeyMemory, context: Context) -> int:
        reading = 2 * cfg.num_heads * cfg.top_k * context.width
        return reading + ProductKeys.flops(cfg, cfg.num_heads, cfg.key_dim, context)

    @staticmethod
    def idle_parameters(cfg: config.ProductKeyMemory, context: Context) -> int:
        return idle_share(cfg, context, cfg.num_heads * cfg.top_k, context.width)


class MemoryPlus(nnx.Module):
    """y = (M(x) * silu(x W_gate)) W_down, M a product-key memory (Berges et al., 2024, arXiv:2412.09764, section 3)."""

    def __init__(self, cfg: config.MemoryPlus, context: Context, rngs: nnx.Rngs):
        d, v = context.width, value_dim(cfg, context)
        self.name = table_name(cfg, context)
        norm = "rms" if cfg.qk_norm else "none"
        self.retrieval = ProductKeys(cfg, cfg.num_heads, half_width(cfg, context), norm, context, rngs)
        self.gate = Linear(rngs, d, v, ("embed", "mlp"), bias=False)
        self.down = Linear(rngs, v, d, ("mlp", "embed"), bias=False, scale=2.0 / context.num_layers)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        values, aux = read_values(self.retrieval, self.name, x, segments, given)
        values = constrain(merge_tokens(values), "batch", "mlp")
        y = self.down(values * jax.nn.silu(self.gate(merge_tokens(x))))
        return split_tokens(y, x), aux, carry

    @staticmethod
    def shared(cfg: config.MemoryPlus, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return value_table(cfg, cfg.num_heads, value_dim(cfg, context), context, rngs)

    @staticmethod
    def taps(cfg: config.MemoryPlus, context: Context, batch: int, length: int) -> dict[str, Array]:
        return {table_name(cfg, context): tap(context, batch, length, value_dim(cfg, context))}

    @staticmethod
    def flops(cfg: config.MemoryPlus, context: Context) -> int:
        reads = cfg.num_heads * cfg.top_k + 2 * context.width
        search = ProductKeys.flops(cfg, cfg.num_heads, half_width(cfg, context), context)
        return 2 * reads * value_dim(cfg, context) + search

    @staticmethod
    def idle_parameters(cfg: config.MemoryPlus, context: Context) -> int:
        return idle_share(cfg, context, cfg.num_heads * cfg.top_k, value_dim(cfg, context))


def read_values(
    retrieval: ProductKeys, name: str, x: Float[Array, "b t d"], segments: Segments, given: Pass
) -> tuple[Float[Array, "b t v"], Aux]:
    """Of each token, the weighted sum of the rows that all heads find, and aux values."""
    table = table_of(given, name)
    rows, weights, aux = retrieval(x, segments.ids != 0, training=given.training)
    rows, weights = (a.reshape(*a.shape[:2], -1) for a in (rows, weights.astype(x.dtype)))  # b t hk
    y, recorded = table.lookup(rows, weights, given)
    return y, aux | recorded


def value_table(
    cfg: config.Memory, num_heads: int, width: int, context: Context, rngs: nnx.Rngs
) -> dict[str, nnx.Module]:
    """N(0, 1 / width), as both papers have it."""
    name, init = table_name(cfg, context), nnx.initializers.normal(width**-0.5)
    return {name: Table(name, cfg.num_rows, width, cfg, context, rngs, init, num_heads * cfg.top_k)}


def half_width(cfg: config.MemoryPlus, context: Context) -> int:
    return context.width // 2 if cfg.key_dim is None else cfg.key_dim


def value_dim(cfg: config.MemoryPlus, context: Context) -> int:
    return context.width if cfg.value_dim is None else cfg.value_dim
