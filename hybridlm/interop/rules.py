"""How parameters of ours and tensors of a published checkpoint become each other, in both directions.

A parameter of ours is named as in our checkpoints, without `params.`: `layers.4.mixer.w_q`. Published linear layers are
[out, in] and have no axis for heads; ours are [in, heads, head dim].

Letters: o outputs, i inputs, w taps, c channels, x experts.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

Shape = tuple[int, ...]
ToOurs = Callable[[Iterable[np.ndarray], Sequence[Shape]], list[np.ndarray]]
"""(their tensors in order, our shapes) -> our parameters. Takes the tensors one after another, and keeps none."""
ToTheirs = Callable[[Sequence[Any]], list[Any]]
"""Our parameters -> their tensors. Also works on what `jax.eval_shape` traces, which tells the tensors' shapes."""


@dataclass(frozen=True)
class Rule:
    """Some parameters of ours that hold what some of their tensors hold."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: ToOurs
    to_theirs: ToTheirs
    exact: bool = True
    """Whether their tensors come back bit for bit."""


def same(ours: str, theirs: str) -> Rule:
    """The array as it is."""
    return Rule((ours,), (theirs,), lambda tensors, shapes: list(tensors), list)


def flat(ours: str | Sequence[str], theirs: str) -> Rule:
    """Arrays as one vector, one after the other."""

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (vector,) = tensors
        return [part.reshape(shape) for part, shape in zip(_cut(vector, map(math.prod, shapes)), shapes, strict=True)]

    return Rule(_names(ours), (theirs,), to_ours, lambda arrays: [_join([a.reshape(-1) for a in arrays])])


def linear(ours: str | Sequence[str], theirs: str, *, num_inputs: int = 1, groups: int = 1) -> Rule:
    """Linear maps [inputs..., outputs...] of the same inputs as one [o, i]: the first outputs of all, group by group.

    `num_inputs` counts the axes of ours that are inputs. With `groups`, the outputs of each are cut into as many parts,
    and theirs has the first part of every map, then the second of every one.
    """

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (weight,) = tensors
        grouped = weight.T.reshape(weight.shape[1], groups, -1)
        sizes = (math.prod(shape[num_inputs:]) // groups for shape in shapes)
        return [part.reshape(shape) for part, shape in zip(_cut(grouped, sizes), shapes, strict=True)]

    def to_theirs(arrays: Sequence[Any]) -> list[Any]:
        num = math.prod(arrays[0].shape[:num_inputs])
        return [_join([array.reshape(num, groups, -1) for array in arrays]).reshape(num, -1).T]

    return Rule(_names(ours), (theirs,), to_ours, to_theirs)


def taps(ours: str | Sequence[str], theirs: str) -> Rule:
    """Taps [w, channels...] of depthwise convolutions as one [c, 1, w]."""

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (kernel,) = tensors
        sizes = (math.prod(shape[1:]) for shape in shapes)
        return [part.reshape(shape) for part, shape in zip(_cut(kernel[:, 0].T, sizes), shapes, strict=True)]

    def to_theirs(arrays: Sequence[Any]) -> list[Any]:
        return [_join([array.reshape(array.shape[0], -1) for array in arrays]).T[:, None]]

    return Rule(_names(ours), (theirs,), to_ours, to_theirs)


def expert_matrices(ours: str, theirs: Sequence[str]) -> Rule:
    """Experts' matrices [x, i, o], one [o, i] for each."""

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (shape,) = shapes
        stacked = np.empty(shape, np.float32)
        for expert, matrix in zip(stacked, tensors, strict=True):
            expert[:] = matrix.T
        return [stacked]

    return Rule((ours,), tuple(theirs), to_ours, lambda arrays: [arrays[0][e].T for e in range(len(theirs))])


def stacked_experts(ours: str | Sequence[str], theirs: str) -> Rule:
    """Experts' matrices [x, i, o] as one [x, o, i]: of several, the outputs of one come after those of the other."""

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (weight,) = tensors
        return _cut(weight.transpose(0, 2, 1), (shape[2] for shape in shapes))

    return Rule(_names(ours), (theirs,), to_ours, lambda arrays: [_join(arrays).transpose(0, 2, 1)])


def under(prefix_ours: str, prefix_theirs: str, rules: Iterable[Rule]) -> list[Rule]:
    """`rules` of a part whose names have these prefixes in the whole."""
    ours, theirs = partial(_prefixed, prefix_ours), partial(_prefixed, prefix_theirs)
    return [replace(rule, ours=ours(rule.ours), theirs=theirs(rule.theirs)) for rule in rules]


def _prefixed(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _cut(array: np.ndarray, sizes: Iterable[int]) -> list[np.ndarray]:
    """Parts of so many elements along the last axis."""
    ends = np.cumsum(list(sizes))
    return [array[..., end - size : end] for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def _join(arrays: Sequence[Any]) -> Any:
    """Along the last axis; nothing is copied where there is one."""
    return arrays[0] if len(arrays) == 1 else arrays[0].__array_namespace__().concat(arrays, axis=-1)
