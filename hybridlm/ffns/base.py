"""What every channel mixer receives and returns."""

from typing import Any, Protocol

from jaxtyping import Array, Float

from hybridlm.mixers.base import Carry, Context, Segments

Aux = dict[str, Array]
"""Scalars by name, averaged over layers; names ending in `_loss` are added to the training loss."""


class FFN(Protocol):
    """A channel mixer."""

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]: ...

    @staticmethod
    def flops(cfg: Any, context: Context) -> int:
        """Forward matmul FLOPs per token (a multiply-add is two)."""
        ...
