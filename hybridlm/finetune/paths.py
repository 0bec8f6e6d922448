"""Paths of parameters, such as `stack.repeats.0.mixer.w_q`, and patterns of them."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from hybridlm.config_check import ConfigError, suggestion


def text_of(path: tuple[Any, ...]) -> str:
    """The dotted form of a path in a pytree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def map_with_paths(f: Callable[[str, Any], Any], params: Any) -> Any:
    """`f(path, leaf)` in place of every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, x: f(text_of(path), x), params)


def by_path(params: Any) -> dict[str, Any]:
    """The leaves by their paths."""
    return {text_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def matches(patterns: Sequence[str], path: str) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def check_patterns(field: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    """Raise ConfigError where one of the patterns of `field` names none of `paths`."""
    for i, pattern in enumerate(patterns):
        if not any(fnmatchcase(path, pattern) for path in paths):
            instead = suggestion(pattern, paths) or f"; there are {', '.join(paths[:6])}, ..."
            raise ConfigError(f"{field}.{i}", f"={pattern!r}: names no parameter that it could{instead}")
