"""Models. Outside this package parameters are plain nested dicts: `init(key) -> params`, `bind(params) -> LM`."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from hybridlm import config
from hybridlm.model.lm import LM

Params = dict[str, Any]


def build(
    model: config.Model, kernels: config.Kernels
) -> tuple[Callable[[Key[Array, ""]], Params], Callable[[Params], LM]]:
    """`init(key) -> params` (call it under jit) and `bind(params) -> LM`, on the mesh in scope."""

    def make(key: Key[Array, ""]) -> LM:
        return LM(model, kernels, nnx.Rngs(params=key))

    graphdef = nnx.graphdef(jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0))))

    def init(key: Key[Array, ""]) -> Params:
        return nnx.to_pure_dict(nnx.state(make(key)))

    def bind(params: Params) -> LM:
        return nnx.merge(graphdef, params)

    return init, bind
