"""The model of a config in the form in which it is trained."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Key

from hybridlm.config import Config
from hybridlm.finetune.adapters import ADAPTERS, adapted, new_adapters
from hybridlm.model import Params, build
from hybridlm.model.lm import LM


def build_trained(cfg: Config) -> tuple[Callable[[Key[Array, ""]], Params], Callable[[Params], LM]]:
    """`init(key) -> params` and `bind(params) -> LM` as `build` has them, with the adapters of `finetune.lora`.

    `bind` also takes parameters without adapters.
    """
    init, bind = build(cfg.model, cfg.kernels)
    lora = cfg.finetune.lora
    if lora is None:
        return init, bind

    def init_with_adapters(key: Key[Array, ""]) -> Params:
        return with_new_adapters(cfg, init(key))

    def bind_adapted(params: Params) -> LM:
        return bind(adapted(lora, params) if ADAPTERS in params else params)

    return init_with_adapters, bind_adapted


def with_new_adapters(cfg: Config, params: Params) -> Params:
    """`params` with the adapters that a run of `cfg` begins with, where it has some."""
    lora = cfg.finetune.lora
    return params if lora is None else new_adapters(lora, params, jax.random.key(cfg.train.seed))
