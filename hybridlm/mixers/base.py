"""What every sequence mixer receives and returns.

Letters: b batch, t time, d model width, h heads, k key dim, e recurrence width, w conv or attention window.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.sharding import is_time_cut

State = dict[str, Array]
"""A mixer's recurrent state or cache: arrays with the batch axis first."""

Carry = dict[str, Any]
"""What crosses layers, by name; empty unless a block puts something there."""


class Segments(NamedTuple):
    """Which document each token belongs to, made once per batch and used by every mixer."""

    ids: Int[Array, "b t"]
    """0 is padding; the id changes where a document begins."""
    positions: Int[Array, "b t"]
    """Position within the document. A token at position 0 sees no earlier token and no earlier state."""


@dataclass(frozen=True)
class Context:
    """Numbers of the whole model that its blocks need."""

    width: int
    num_layers: int
    norm_eps: float
    dtype: Any
    """Of activations."""
    kernels: config.Kernels
    ffns: tuple[config.FFN | None, ...] = ()
    """Of all layers in order."""
    norm_offset: bool = True
    """Whether norms multiply by 1 + scale."""


class Mixer(Protocol):
    """A sequence mixer: training (`state` None), prefill and one-token decode are one code path."""

    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, state: State | None, carry: Carry
    ) -> tuple[Float[Array, "b t d"], State | None, Carry]:
        """Mix over time. Documents never see each other; padding tokens leave the state unchanged."""
        ...

    def init_state(self, batch: int, length: int) -> State:
        """State before the first token, for up to `length` tokens (which only unbounded caches depend on)."""
        ...

    @staticmethod
    def flops(cfg: Any, context: Context, length: int) -> int:
        """Forward matmul FLOPs per token at sequence length `length` (a multiply-add is two)."""
        ...


def document_positions(ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token within its run of equal ids."""
    time = jnp.arange(ids.shape[1], dtype=jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return time - jax.lax.cummax(jnp.where(starts, time, 0), axis=1)


def continues(segments: Segments) -> Bool[Array, " b"]:
    """Whether the state of each row is still good: its first real token goes on with a document, or it has none."""
    real = segments.ids != 0
    first = jnp.argmax(real, axis=1, keepdims=True)
    goes_on = jnp.take_along_axis(segments.positions, first, axis=1)[:, 0] != 0
    return goes_on | ~jnp.any(real, axis=1)


def document_numbers(segments: Segments) -> Int[Array, "b t"]:
    """What kernels tell documents apart by: 0 at padding, else 1 + the number of documents that began in the row.

    Positions say where a document begins; an id may come back.
    """
    real = segments.ids != 0
    if is_time_cut(segments.ids):
        # Where it began, which each device knows of its own tokens; in training a document is in one piece.
        return jnp.where(real, 1 + jnp.arange(real.shape[1]) - segments.positions, 0)
    return jnp.where(real, 1 + jnp.cumsum(real & (segments.positions == 0), axis=1, dtype=jnp.int32), 0)
