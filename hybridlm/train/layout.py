"""The layout of states in checkpoints: a flat dictionary of arrays whose dotted names count layers.

`params.stack.repeats.1.mixer.w_q`, which has a slice for every repeat of the pattern, becomes
`params.layers.4.mixer.w_q`, `params.layers.7.mixer.w_q`, ...; so do the optimizer's moments of it. However a config
splits its layers into prologue, repeats, tail and epilogue, and whatever the mesh, the same model has the same names.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hybridlm import config
from hybridlm.model.by_layer import places
from hybridlm.train import fingerprint

STACK, LAYERS = "stack", "layers"
SMALLEST_PART = 1 << 20
"""Bytes; an array's copies on several devices share the work of saving it, but not in parts smaller than this."""


class Leaf(NamedTuple):
    """An array of a state, and what it is called in a checkpoint: by several names where it has several layers."""

    names: tuple[str, ...]
    is_stacked: bool
    value: Any


def leaves_of(state: Any, model: config.Model) -> list[Leaf]:
    """The arrays of a state, or of a part of one, in JAX's order."""
    layers: dict[tuple[str, int], list[int]] = {}
    for layer, (part, position, _) in enumerate(places(model)):
        layers.setdefault((part, position), []).append(layer)

    def leaf(path: tuple[Any, ...], value: Any) -> Leaf:
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        if STACK not in keys:
            return Leaf((".".join(keys),), False, value)
        at = keys.index(STACK)
        part, position = keys[at + 1], int(keys[at + 2])
        names = (".".join([*keys[:at], LAYERS, str(i), *keys[at + 3 :]]) for i in layers[part, position])
        return Leaf(tuple(names), part == "repeats", value)

    return [leaf(path, value) for path, value in jax.tree_util.tree_leaves_with_path(state)]


def flat(state: Any, model: config.Model) -> dict[str, Any]:
    """The arrays of a state by their names in a checkpoint.

    On an accelerator single layers are copied to host memory one stack after another, so that beside the state its
    devices hold one stack more, not all of them.
    """
    arrays: dict[str, Any] = {}
    for leaf in leaves_of(state, model):
        if not leaf.is_stacked:
            arrays[leaf.names[0]] = leaf.value
            continue
        layers = _splitter(_spread(leaf.value))(leaf.value)
        arrays.update(zip(leaf.names, map(_on_host, layers), strict=True))
    return arrays


def flat_abstract(abstract: Any, model: config.Model) -> dict[str, Any]:
    """What a checkpoint has of the arrays that `abstract` describes, with the shardings that `stacked` wants."""

    def of_layer(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return value[0]
        sharding = value.sharding
        if isinstance(sharding, jax.NamedSharding):
            sharding = jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
        return jax.ShapeDtypeStruct(value.shape[1:], value.dtype, sharding=sharding)

    return {
        name: of_layer(leaf.value) if leaf.is_stacked else leaf.value
        for leaf in leaves_of(abstract, model)
        for name in leaf.names
    }


def stacked(arrays: dict[str, Any], abstract: Any, model: config.Model) -> Any:
    """The inverse of `flat`, in the form of `abstract`. Empties `arrays`: no layer is held twice for long."""
    leaves = [assembled(leaf, arrays) for leaf in leaves_of(abstract, model)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def assembled(leaf: Leaf, arrays: dict[str, Any]) -> Any:
    """One array of a state from those of its names, which are taken out of `arrays` and, on devices, deleted."""
    parts = [arrays.pop(name) for name in leaf.names]
    if not leaf.is_stacked:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts)
    whole = _stack(parts)
    whole.block_until_ready()
    for part in parts:
        part.delete()
    return whole


def fingerprints(state: Any, model: config.Model) -> dict[str, str]:
    """Those of the arrays of `flat`, without making them. All processes must call."""
    leaves = leaves_of(state, model)
    found = fingerprint.of_slices([(leaf.value, leaf.is_stacked) for leaf in leaves])
    return {
        name: fingerprint.as_text(value)
        for leaf, values in zip(leaves, found, strict=True)
        for name, value in zip(leaf.names, values, strict=True)
    }


def shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each array."""
    return {name: (tuple(x.shape), str(x.dtype)) for name, x in arrays.items()}


_stack = jax.jit(lambda parts: jnp.stack(parts))


@functools.cache
def _splitter(sharding: jax.sharding.Sharding) -> Callable[[jax.Array], tuple[jax.Array, ...]]:
    def split(x: jax.Array) -> tuple[jax.Array, ...]:
        if isinstance(sharding, jax.NamedSharding):
            x = jax.sharding.reshard(x, sharding)
        return tuple(x[i] for i in range(x.shape[0]))

    return jax.jit(split)


def _spread(x: jax.Array) -> jax.sharding.Sharding:
    """How to cut a stack of layers so that its copies on several devices hold a part of it each."""
    sharding = x.sharding
    if not isinstance(sharding, jax.NamedSharding):
        return sharding
    shape = list(sharding.shard_shape(x.shape))
    spec: list[tuple[Any, ...]] = [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in sharding.spec]
    spec += [()] * (x.ndim - len(spec))
    used = {axis for axes in spec for axis in axes}
    for name, size in sharding.mesh.shape.items():
        if size == 1 or name in used or math.prod(shape[1:]) * x.dtype.itemsize < size * SMALLEST_PART:
            continue
        axis = next((i for i in range(1, x.ndim) if shape[i] % size == 0), None)
        if axis is not None:
            spec[axis] += (name,)
            shape[axis] //= size
    return jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*(axes or None for axes in spec)))


def _on_host(x: jax.Array) -> jax.Array:
    kind = _host_memory(next(iter(x.sharding.device_set)))
    return x if kind is None else jax.device_put(x, x.sharding.with_memory_kind(kind)).block_until_ready()


def _host_memory(device: Any) -> str | None:
    """What the device calls the host's memory; None where that is its own."""
    if device.platform == "cpu":
        return None
    return next((memory.kind for memory in device.addressable_memories() if memory.kind == "pinned_host"), None)
