"""A stack's parameters layer by layer, whichever way its config splits them into parts, and back."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from hybridlm import config


class Place(NamedTuple):
    """Where a layer's parameters lie: `stack[part][position]`, of scanned ones the slice `repeat`."""

    part: str
    position: int
    repeat: int | None


def places(model: config.Model) -> list[Place]:
    """That of every layer, in the order of `model.blocks()`."""
    length = len(model.pattern)
    repeats, tail = divmod(model.num_layers - len(model.prologue) - len(model.epilogue), length)
    return [
        *(Place("prologue", i, None) for i in range(len(model.prologue))),
        *(Place("repeats", i, repeat) for repeat in range(repeats) for i in range(length)),
        *(Place("tail", i, None) for i in range(tail)),
        *(Place("epilogue", i, None) for i in range(len(model.epilogue))),
    ]


def field_of(model: config.Model, layer: int) -> str:
    """The dotted path of a layer's block in the config."""
    part, position, _ = places(model)[layer]
    return f"{'pattern' if part in ('repeats', 'tail') else part}.{position}"


def layers_of(stack: dict[str, Any], model: config.Model) -> list[dict[str, Any]]:
    """Each layer's parameters as NumPy arrays, views where those of the stack are such."""
    stack = jax.device_get(stack)

    def layer(place: Place) -> dict[str, Any]:
        block = stack[place.part][place.position]
        return block if place.repeat is None else jax.tree.map(lambda x: x[place.repeat], block)

    return [layer(place) for place in places(model)]


def by_name(params: dict[str, Any], model: config.Model) -> dict[str, np.ndarray]:
    """NumPy arrays by names that count layers, such as `layers.4.mixer.w_q`; views where `params` are such."""
    params = jax.device_get(params)
    layers = dict(enumerate(layers_of(params["stack"], model)))
    named = {"layers": layers} | {name: part for name, part in params.items() if name != "stack"}
    leaves = jax.tree_util.tree_leaves_with_path(named)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def stack_of(layers: Sequence[dict[str, Any]], model: config.Model) -> dict[str, Any]:
    """The inverse of `layers_of`; its arrays are NumPy's."""
    stack: dict[str, Any] = {}
    repeats: dict[int, list[dict[str, Any]]] = {}
    for (part, position, repeat), layer in zip(places(model), layers, strict=True):
        if repeat is None:
            stack.setdefault(part, {})[position] = jax.tree.map(np.asarray, layer)
        else:
            repeats.setdefault(position, []).append(layer)
    if repeats:
        stack["repeats"] = {
            position: jax.tree.map(lambda *parts: np.stack(parts), *blocks) for position, blocks in repeats.items()
        }
    return stack


def drawn(
    init: Callable[[Key[Array, ""]], dict[str, Any]], key: Key[Array, ""], names: Collection[str]
) -> dict[str, Any]:
    """What `init(key)` gives below any of `names`; None in place of all other parameters, which cost nothing."""

    def selected(key: Key[Array, ""]) -> dict[str, Any]:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if any(step.key in names for step in path) else None, init(key)
        )

    return jax.device_get(jax.jit(selected)(key))
