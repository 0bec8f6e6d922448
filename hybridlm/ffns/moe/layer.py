"""The mixture of experts: router -> dispatch -> experts -> combine, and a shared expert beside them.

Letters: b batch, t time, d model width, n tokens (b t), x experts, k experts per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.gated_mlp import GatedMLP
from hybridlm.ffns.moe.dispatch import DISPATCHES
from hybridlm.ffns.moe.experts import AXES, Experts, Weights
from hybridlm.ffns.moe.routers import ROUTERS
from hybridlm.ffns.moe.routing import Tokens, statistics
from hybridlm.layers import contract, fan_in_normal, merge_tokens, split_tokens
from hybridlm.mixers.base import Carry, Context, Segments
from hybridlm.sharding import constrain, param, per_device, total


class MoE(nnx.Module):
    """y = sum_e w_e(x) E_e(x) + S(x): w from the router, which tells most experts nothing; S the shared expert."""

    def __init__(self, cfg: config.MoE, context: Context, rngs: nnx.Rngs):
        self.cfg = cfg
        self.router = ROUTERS.module_of(cfg.router)(cfg.router, cfg.num_experts, context, rngs)
        self.experts = Experts(cfg, context, rngs)
        self.shared_expert = None if cfg.shared_hidden is None else GatedMLP(_shared(cfg), context, rngs)
        gate = ((context.width, 1), ("embed", None), fan_in_normal(1.0))
        self.w_shared_gate = param(rngs, *gate) if cfg.shared_gate else None
        if type(cfg.dispatch) not in DISPATCHES:
            known = ", ".join(cls.__name__ for cls in DISPATCHES)
            raise ConfigError("dispatch", f": {type(cfg.dispatch).__name__} is not known; known are {known}")

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        rows = ("batch",)
        carried = jax.tree.map(lambda a: rows if jnp.ndim(a) else (), carry)
        told = Pass(rows, (), (), (), ())  # pyright: ignore[reportArgumentType]
        routed = per_device(self._routed, in_axes=((), AXES, rows, rows, carried, told), out_axes=(rows, (), carried))
        y, aux, carry = routed(self.router, self.experts.weights(x.dtype), x, segments.ids != 0, carry, given)
        return y if self.shared_expert is None else y + self._shared(x, segments, carry, given), aux, carry

    def _routed(
        self,
        router: Any,
        weights: Weights,
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"],
        carry: Carry,
        given: Pass,
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        """One device's tokens through the experts of all."""
        tokens = Tokens(x.reshape(-1, x.shape[-1]), real.reshape(-1), x.shape[1])
        num_experts, per_token = self.cfg.num_experts, self.experts_per_token(self.cfg)
        weights = self.experts.gathered(weights, x.dtype)
        routing, aux, carry = router(tokens, carry, given)
        # Outside training a fixed capacity would only lose tokens.
        cfg = self.cfg.dispatch if given.training else config.Dropless()
        y, dropped = DISPATCHES[type(cfg)](cfg, tokens, routing, self.experts, weights, num_experts, per_token)
        y = total(y, "mlp")
        choices = jnp.maximum(total(jnp.sum(routing.experts < num_experts), "batch"), 1)
        aux |= statistics(routing.experts, tokens.real, num_experts)
        aux["moe_dropped"] = total(dropped, "batch") / choices
        return y.reshape(x.shape), aux, carry

    def _shared(self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass) -> Float[Array, "b t d"]:
        assert self.shared_expert is not None
        y, _, _ = self.shared_expert(x, segments, carry, given)
        if self.w_shared_gate is None:
            return y
        gate = contract("nd,dh->nh", merge_tokens(x), self.w_shared_gate[...], "batch", None)
        return jax.nn.sigmoid(split_tokens(gate, x)) * y

    @staticmethod
    def init_carry(cfg: config.MoE, context: Context, batch: int, length: int) -> Carry:
        make = getattr(ROUTERS.module_of(cfg.router), "init_carry", None)
        if make is None:
            return {}
        carry = make(cfg.router, cfg.num_experts, context, batch, length)
        return jax.tree.map(lambda a: constrain(a, *("batch",) * min(a.ndim, 1), *(None,) * (a.ndim - 1)), carry)

    @staticmethod
    def shared(cfg: config.MoE, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        make = getattr(ROUTERS.module_of(cfg.router), "shared", None)
        return {} if make is None else make(cfg.router, cfg.num_experts, context, rngs)

    @staticmethod
    def experts_per_token(cfg: config.MoE) -> float:
        """On average."""
        return ROUTERS.module_of(cfg.router).experts_per_token(cfg.router, cfg.num_experts)

    @staticmethod
    def idle_parameters(cfg: config.MoE, context: Context) -> int:
        """Those of the experts that a token does not go to, on average."""
        return round(3 * context.width * cfg.hidden * (cfg.num_experts - MoE.experts_per_token(cfg)))

    @staticmethod
    def flops(cfg: config.MoE, context: Context) -> int:
        """Those of the experts that a token goes to. One-hot dispatch, and capacity that stays empty, come on top."""
        router = ROUTERS.module_of(cfg.router).flops(cfg.router, cfg.num_experts, context)
        hidden = MoE.experts_per_token(cfg) * cfg.hidden + (cfg.shared_hidden or 0)
        return router + round(6 * context.width * hidden) + 2 * context.width * cfg.shared_gate


def _shared(cfg: config.MoE) -> config.GatedMLP:
    assert cfg.shared_hidden is not None
    return getattr(config, cfg.activation)(hidden=cfg.shared_hidden)
