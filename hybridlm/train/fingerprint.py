"""Fingerprints of arrays: 64 bits that do not depend on how an array lies over devices, and change with any bit of it.

A word w (an element's bits; of eight bytes, two words) at position p of the flattened array becomes
m = mix(w xor p * odd), a bijection of w. A fingerprint is the sum of all m, and of all mix(m), modulo 2^32. Sums of
integers that wrap around are associative, so every mesh and every number of hosts has the same; and since a changed
word changes its m, a change of one alone never goes unseen. It is a checksum, not a signature.

Letters: n words.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

BLOCK = 1 << 16
"""Elements that NumPy mixes at once: what they need stays in a processor's cache."""


def fingerprints(tree: Any) -> Any:
    """`tree` with uint32[2] in place of every array, of NumPy or on devices. All processes must call."""
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten([found[0] for found in of_slices([(leaf, False) for leaf in leaves])])


def of_slices(arrays: list[tuple[Any, bool]]) -> list[np.ndarray]:
    """uint32[s, 2] for each array: those of x[0], ..., x[s - 1] where it is paired with True, else that of x.

    Every device reads its own part; hosts add up what theirs found. There is one exchange between processes and none
    between devices, which on fake ones of a CPU wait for each other for good where many exchanges are under way.
    """
    running = _on_each_device(arrays)
    found = [
        _of_host_slices(x, each) if parts is None else _summed(x, parts)
        for (x, each), parts in zip(arrays, running, strict=True)
    ]
    totals = _over_processes(found)
    return [x if parts is None else total for x, parts, total in zip(found, running, totals, strict=True)]


def as_text(fingerprint: Any) -> str:
    """Of one array, as 16 hexadecimal digits."""
    return "".join(f"{int(word):08x}" for word in np.asarray(fingerprint))


def of_host(x: np.ndarray, first: int = 0) -> np.ndarray:
    """That of an array in host memory, or the summand that its elements `first`, `first` + 1, ... contribute."""
    flat = np.ascontiguousarray(x).reshape(-1)
    width = flat.dtype.itemsize
    words = flat.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
    first *= max(1, width // 4)
    total = np.zeros(2, np.uint32)
    for start in range(0, words.size, BLOCK):
        block = words[start : start + BLOCK].astype(np.uint32)
        positions = np.arange(block.size, dtype=np.uint32) + np.uint32((first + start) % 2**32)
        total += np.stack([part.sum(dtype=np.uint32) for part in _mixed(block, positions)])
    return total


def _of_host_slices(x: np.ndarray, each: bool) -> np.ndarray:
    return np.stack([of_host(part) for part in x] if each else [of_host(x)])


def _on_each_device(arrays: list[tuple[Any, bool]]) -> list[jax.Array | None]:
    """[devices, s, 2] for each array: what every device's part contributes. None for those of NumPy."""
    found: list[jax.Array | None] = [None] * len(arrays)
    on_meshes: dict[Any, list[int]] = {}
    for i, (x, each) in enumerate(arrays):
        if isinstance(x, np.ndarray):
            continue
        if isinstance(x.sharding, jax.NamedSharding):
            on_meshes.setdefault(x.sharding.mesh, []).append(i)
        else:
            assert len(x.sharding.device_set) == 1, x.sharding
            found[i] = _alone(x, each)
    for mesh, places in on_meshes.items():
        # One program for all: to compile one for each takes far longer.
        kinds = tuple(Kind(arrays[i][0].sharding.spec, arrays[i][0].shape, arrays[i][1]) for i in places)
        for i, parts in zip(places, _program(mesh, kinds)([arrays[i][0] for i in places]), strict=True):
            found[i] = parts
    return found


def _summed(x: jax.Array, contributed: jax.Array) -> np.ndarray:
    """[s, 2]: what this process's devices contribute, copies only once."""
    first = {shard.device for shard in x.addressable_shards if shard.replica_id == 0}
    parts = [np.asarray(shard.data)[0] for shard in contributed.addressable_shards if shard.device in first]
    nothing = np.zeros(contributed.shape[1:], np.uint32)
    return np.asarray(sum(parts, start=nothing))


class Kind(NamedTuple):
    """How an array is spread over a mesh, and whether its slices are asked for."""

    spec: PartitionSpec
    shape: tuple[int, ...]
    each: bool

    def local(self, x: jax.Array) -> jax.Array:
        axes_of = (*self.spec, *(None for _ in range(x.ndim - len(self.spec))))
        sizes = zip(axes_of, x.shape, strict=True)
        firsts = [jax.lax.axis_index(axes) * size if axes else 0 for axes, size in sizes]
        return _contributions(x, firsts, self.shape, self.each)


@functools.lru_cache(maxsize=8)
def _program(mesh: Any, kinds: tuple[Kind, ...]) -> Callable[[list[jax.Array]], list[jax.Array]]:
    def local(arrays: list[jax.Array]) -> list[jax.Array]:
        return [kind.local(x) for kind, x in zip(kinds, arrays, strict=True)]

    everywhere = PartitionSpec(mesh.axis_names)
    specs = ([kind.spec for kind in kinds],)
    # Without `check_vma`, which would take copies for equal: whether they are is a question to be asked.
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=everywhere, check_vma=False))


@functools.partial(jax.jit, static_argnums=1)
def _alone(x: jax.Array, each: bool) -> jax.Array:
    return _contributions(x, [0] * x.ndim, x.shape, each)


def _contributions(x: jax.Array, firsts: list[Any], shape: tuple[int, ...], each: bool) -> jax.Array:
    """[1, s, 2]: what the part of an array of `shape` that begins at `firsts` contributes."""
    if each:
        return jax.vmap(lambda part: _of_part(part, firsts[1:], shape[1:]))(x)[None]
    return _of_part(x, firsts, shape)[None, None]


def _of_part(x: jax.Array, firsts: list[Any], shape: tuple[int, ...]) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], -1)
        firsts, shape = [*firsts, 0], (*shape, 2)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    if words.ndim > x.ndim:  # two words of eight bytes
        firsts, shape = [*firsts, 0], (*shape, 2)
    positions = jnp.zeros((), jnp.uint32)
    for axis, first in enumerate(firsts):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) + jnp.asarray(first).astype(jnp.uint32)
        positions = positions + index * stride
    return jnp.stack([jnp.sum(part, dtype=jnp.uint32) for part in _mixed(words, positions)])


def _mixed(words: Any, positions: Any) -> tuple[Any, Any]:
    """Both summands of every word; uint32, NumPy's or JAX's."""
    # Odd factors and shifted xors are bijections. Those of MurmurHash3's end let every bit of a word reach all of m:
    # with fewer of them the changes by two flipped signs would often cancel.
    m = words ^ (positions * np.uint32(0x9E3779B1))
    m = (m ^ (m >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    m = (m ^ (m >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    m = m ^ (m >> np.uint32(16))
    again = m * np.uint32(0x27D4EB2F)
    return m, again ^ (again >> np.uint32(15))


def diverged_replicas(tree: Any) -> list[str]:
    """Names of the arrays whose copies on several devices are not all the same.

    Every device reads its own copy; arrays without copies are passed over. All processes get the same answer, and all
    must ask.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    copied = [(path, x) for path, x in leaves if _unused_axes(x.sharding)]
    running = _on_each_device([(x, False) for _, x in copied])
    tables = _over_processes([_by_device(contributed) for contributed in running if contributed is not None])
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, x), table in zip(copied, tables, strict=True)
        if _differ(table, x.sharding)
    ]


def _by_device(contributed: jax.Array) -> np.ndarray:
    """[devices, 2], zeros for those of other processes."""
    table = np.zeros((contributed.shape[0], 2), np.uint32)
    for shard in contributed.addressable_shards:
        table[shard.index[0]] = np.asarray(shard.data)[0]
    return table


def _differ(table: np.ndarray, sharding: jax.NamedSharding) -> bool:
    sizes, unused = sharding.mesh.shape, _unused_axes(sharding)
    over = tuple(i for i, name in enumerate(sizes) if name in unused)
    by_axis = table.reshape(*sizes.values(), 2)
    return bool((by_axis.max(over) != by_axis.min(over)).any())


def _unused_axes(sharding: jax.sharding.Sharding) -> set[str]:
    """Mesh axes of several devices along which an array is copied."""
    if not isinstance(sharding, jax.NamedSharding):
        return set()
    used = {axis for axes in sharding.spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
    return {name for name, size in sharding.mesh.shape.items() if size > 1 and name not in used}


def _over_processes(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Their sums, each [n, 2], over all processes."""
    if jax.process_count() == 1 or not arrays:
        return arrays
    gathered = np.asarray(multihost_utils.process_allgather(np.concatenate(arrays)))
    return np.split(gathered.sum(0, dtype=np.uint32), np.cumsum([len(x) for x in arrays])[:-1])
