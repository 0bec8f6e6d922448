"""What every channel mixer receives and returns."""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from hybridlm import config
from hybridlm.mixers.base import Carry, Context, Segments
from hybridlm.registry import Registry

FFNS: Registry[config.FFN] = Registry("ffn")

Aux = dict[str, Array]
"""Scalars by name. Those whose names end in `_loss` are summed over layers and added to the training loss."""

RECORDED = "recorded/"
"""What the names of aux values begin with that are no metrics, but what tables' gradients are made from."""


class Pass(NamedTuple):
    """What all layers of one forward pass are told."""

    tokens: Int[Array, "b t"]
    step: Int[Array, ""] | None = None
    """Optimizer steps taken, which schedules read; where absent, they are at their end."""
    key: Key[Array, ""] | None = None
    """Of noise; absent outside training."""
    shared: dict[str, Any] | None = None
    """Modules that layers share, by the names that `FFN.shared` gives them."""
    layer: Int[Array, ""] | int = 0
    """Of the layer that reads it."""
    taps: Any = None
    """Zeros that the layer adds to what its tables answer, by the tables' names; absent where tables are differentiated
    like other parameters. The stack is given those of all layers, as `Stack.taps` makes them."""

    @property
    def training(self) -> bool:
        return self.key is not None

    def layer_key(self) -> Key[Array, ""]:
        """The noise of this layer alone."""
        assert self.key is not None, "noise is for training"
        return jax.random.fold_in(self.key, self.layer)

    def progress(self, steps: int) -> Float[Array, ""]:
        """How much of a schedule of so many steps has passed, in [0, 1]."""
        if self.step is None or steps == 0:
            return jnp.ones(())
        return jnp.minimum(self.step / steps, 1.0)


class FFN(Protocol):
    """A channel mixer.

    A class may also have `init_carry(cfg, context, batch, length) -> Carry`, what the first layer finds in the carry,
    `shared(cfg, context, rngs) -> dict[str, nnx.Module]`, parameters that are the same in all layers,
    `taps(cfg, context, batch, length) -> dict[str, Array]`, those of its tables, and
    `idle_parameters(cfg, context) -> int`, how many a token does not use.
    """

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]: ...

    @staticmethod
    def flops(cfg: Any, context: Context) -> int:
        """Forward matmul FLOPs per token (a multiply-add is two)."""
        ...
