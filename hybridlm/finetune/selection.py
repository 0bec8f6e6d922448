"""Which parameters are trained. Those that are not have no gradient and no optimizer state."""

from typing import Any

import jax

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.finetune.adapters import ADAPTERS, base_of
from hybridlm.finetune.paths import by_path, check_patterns, map_with_paths, matches
from hybridlm.model import Params


def is_trained(settings: config.Finetune, path: str) -> bool:
    """Whether the parameter at `path` is."""
    if path.startswith(f"{ADAPTERS}."):
        return True
    if matches(settings.frozen, path):
        return False
    named = (*settings.trained, *settings.fresh)
    return matches(named, path) if settings.lora is not None or settings.trained else True


def trained_part(settings: config.Finetune, params: Params) -> Params:
    """`params` with None in place of what is not trained."""
    if settings.lora is None and not settings.frozen and not settings.trained:
        return params
    return map_with_paths(lambda path, x: x if is_trained(settings, path) else None, params)


def rejoined(part: Params, params: Params) -> Params:
    """`part`, with what is None in it from `params`."""
    return jax.tree.map(lambda mine, whole: whole if mine is None else mine, part, params, is_leaf=lambda x: x is None)


def check_selection(settings: config.Finetune, params: Any) -> None:
    """Raise ConfigError where a pattern names no parameter of the abstract `params`, or nothing is trained."""
    paths = list(by_path(base_of(params)))
    check_patterns("finetune.frozen", settings.frozen, paths)
    check_patterns("finetune.trained", settings.trained, paths)
    check_patterns("finetune.fresh", settings.fresh, paths)
    if not jax.tree.leaves(trained_part(settings, params)):
        raise ConfigError("finetune", ": trains no parameter; let `trained` name one, or fewer be `frozen`")
