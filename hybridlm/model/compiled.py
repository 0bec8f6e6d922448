"""A model with its parameters, as one compiled call.

Letters: b batch, t time, v vocabulary.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from hybridlm.ffns.moe.buffered import ExpertStore
from hybridlm.model import Params
from hybridlm.model.lm import LM, LMState


class Model:
    """A trained language model: parameters, and a compiled call."""

    def __init__(self, params: Params, bind: Callable[[Params], LM], store: ExpertStore | None = None):
        """`store` has the experts that are not among `params`, and counts what is fetched of them."""
        self.params, self.bind, self.store = params, bind, store

    @cached_property
    def _call(self) -> Any:
        return jax.jit(lambda params, *args: self.bind(params)(*args))

    def __call__(
        self, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None, state: LMState | None = None
    ) -> tuple[Float[Array, "b t v"], LMState | None]:
        """Float32 logits, and the state after the last token where one was given; see `LM.__call__`."""
        return self._call(self.params, tokens, segment_ids, state)

    def init_state(self, batch: int, length: int) -> LMState:
        """The state before the first of up to `length` tokens."""
        return self.bind(self.params).init_state(batch, length)
