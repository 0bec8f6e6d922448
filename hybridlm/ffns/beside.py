"""A memory beside an MLP, its answer added at once or some blocks later.

Letters: b batch, t time, d model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from hybridlm import config
from hybridlm.ffns.base import FFNS, Aux, Pass
from hybridlm.ffns.gated_mlp import GatedMLP
from hybridlm.mixers.base import Carry, Context, Segments
from hybridlm.sharding import constrain

HELD = "held"


class Beside(nnx.Module):
    """y = F(x) + M(x); with `held`, y = F(x), and M(x) goes into the carry for the next `AddHeld`."""

    def __init__(self, cfg: config.Beside, context: Context, rngs: nnx.Rngs):
        self.held = cfg.held
        self.ffn = GatedMLP(cfg.ffn, context, rngs)
        self.memory = FFNS.module_of(cfg.memory)(cfg.memory, context, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        read, aux, carry = self.memory(x, segments, carry, given)
        y, _, carry = self.ffn(x, segments, carry, given)
        return (y, aux, carry | {HELD: read}) if self.held else (y + read, aux, carry)

    @staticmethod
    def init_carry(cfg: config.Beside, context: Context, batch: int, length: int) -> Carry:
        return AddHeld.init_carry(cfg, context, batch, length) if cfg.held else {}

    @staticmethod
    def shared(cfg: config.Beside, context: Context, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        return FFNS.module_of(cfg.memory).shared(cfg.memory, context, rngs)

    @staticmethod
    def taps(cfg: config.Beside, context: Context, batch: int, length: int) -> dict[str, jax.Array]:
        return FFNS.module_of(cfg.memory).taps(cfg.memory, context, batch, length)

    @staticmethod
    def idle_parameters(cfg: config.Beside, context: Context) -> int:
        return FFNS.module_of(cfg.memory).idle_parameters(cfg.memory, context)

    @staticmethod
    def flops(cfg: config.Beside, context: Context) -> int:
        return GatedMLP.flops(cfg.ffn, context) + FFNS.module_of(cfg.memory).flops(cfg.memory, context)


class AddHeld(nnx.Module):
    """y = F(x) + what the last `Beside` with `held` read."""

    def __init__(self, cfg: config.AddHeld, context: Context, rngs: nnx.Rngs):
        self.ffn = GatedMLP(cfg.ffn, context, rngs)

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        y, aux, carry = self.ffn(x, segments, carry, given)
        return y + carry[HELD].astype(y.dtype), aux, carry

    @staticmethod
    def init_carry(cfg: config.FFN, context: Context, batch: int, length: int) -> Carry:
        return {HELD: constrain(jnp.zeros((batch, length, context.width), context.dtype), "batch", None, None)}

    @staticmethod
    def flops(cfg: config.AddHeld, context: Context) -> int:
        return GatedMLP.flops(cfg.ffn, context)
