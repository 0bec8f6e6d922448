"""How an operation runs on sharded operands, and what its devices tell each other when they hold parts of a sequence.

Letters: b batch, t time, d channels, p devices along the sequence.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from hybridlm_kernels.jax_compat import gather_equal, vary, varying_axes

Axis = str | tuple[str, ...]
"""The mesh axes that a sequence is cut over: every device holds one stretch of time, in the order of the devices."""


def local(
    function: Callable[..., tuple[Array, ...]],
    operands: Sequence[tuple[Array | None, str]],
    results: Sequence[str],
    sequence_axis: Axis | None = None,
    whole: str = "",
) -> tuple[Array, ...]:
    """`function(*operands, sequence_axis=)` run by every device on its own shard; nothing that is sharded is gathered.

    Each operand comes with one letter per axis, such as "btd"; `results` names the axes of what comes back. The first
    operand decides how a letter is sharded and the others are resharded to agree; every device holds all of the axes
    that `whole` names. Without sharded operands, with automatic axes, or inside a `jax.shard_map`, this is a plain
    call. `sequence_axis` is None where a device holds all of time.
    """
    arrays = [array for array, _ in operands]
    mesh, explicit = _explicit_mesh(arrays)
    if mesh is None:
        return function(*arrays, sequence_axis=sequence_axis)
    leader, letters = operands[0]
    assert leader is not None, "the first operand decides the sharding"
    of_letter = {n: s for n, s in zip(letters, _spec(leader), strict=True) if n not in whole}
    over_time = of_letter.get("t")
    if over_time is not None:
        if sequence_axis not in (None, over_time):
            raise ValueError(f"sequence_axis={sequence_axis!r}: x has its time axis over {over_time!r}; leave it out")
        if num_devices(over_time, mesh) == 1:  # nothing to exchange
            uncut = [(array if array is None else _without(array, over_time, mesh), names) for array, names in operands]
            cut = {"t": over_time}
            return tuple(
                _reshard(y, mesh, PartitionSpec(*(cut.get(n, s) for n, s in zip(names, _spec(y), strict=True))))
                for y, names in zip(local(function, uncut, results, whole=whole), results, strict=True)
            )
        sequence_axis = over_time

    def agreed(names: str) -> PartitionSpec:
        return PartitionSpec(*(of_letter.get(name) for name in names))

    placed = [
        array if array is None or _spec(array) == tuple(agreed(names)) else _reshard(array, mesh, agreed(names))
        for array, names in operands
    ]
    if not any(of_letter.values()):
        return function(*placed, sequence_axis=sequence_axis)

    def run(*operands: Array | None) -> tuple[Array, ...]:
        return function(*operands, sequence_axis=sequence_axis)

    out_specs = tuple(agreed(names) for names in results)
    if AxisType.Manual in mesh.axis_types:
        if over_time is not None:
            raise ValueError(
                f"x: its time axis is sharded over {over_time!r} inside a shard_map over other axes; make"
                f" {over_time!r} manual too and pass sequence_axis={over_time!r}"
            )
        # The gradient of a shard_map within another over different axes fails to lower (jax 0.10 to 0.12), so the
        # compiler divides the work over the axes that are left.
        automatic = jax.sharding.auto_axes(run, axes=explicit, out_sharding=out_specs)
        return cast(tuple[Array, ...], automatic(*placed))
    in_specs = tuple(agreed(names) for _, names in operands)
    return jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(explicit))(*placed)


def left_to_compiler(operands: Sequence[Any]) -> list[str]:
    """The mesh axes over which `local` leaves the division of work to the compiler."""
    meshes = [getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) for x in operands if x is not None]
    mesh = next((mesh for mesh in meshes if mesh is not None and not mesh.empty), jax.sharding.get_abstract_mesh())
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    given_over = {AxisType.Auto} | ({AxisType.Explicit} if AxisType.Manual in kinds.values() else set())
    return [name for name, kind in kinds.items() if kind in given_over and mesh.shape[name] > 1]


def num_devices(axis: Axis, mesh: AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def pass_on(
    decay: Array,
    added: Array,
    state: Array,
    axis: Axis,
    reverse: bool,
    apply: Callable[[Array, Array], Array] = jnp.multiply,
) -> tuple[Array, Array]:
    """The state that enters this device's stretch of time, and the state after the last stretch, [b, ...] both.

    A stretch turns a state s into `apply(decay, s) + added`; `state` is what enters the first one. One all-gather of
    decays and additions together; every device then composes what lies before it. `reverse`: time runs from the last
    device on.
    """
    rows = added.shape[0]
    flat = [x.astype(added.dtype).reshape(rows, -1) for x in (decay, added)]
    stretches = gather_equal(jnp.concatenate(flat, axis=1), axis)  # p b *
    num, me = stretches.shape[0], lax.axis_index(axis)
    decays = stretches[..., : flat[0].shape[1]].reshape(num, *decay.shape)
    additions = stretches[..., flat[0].shape[1] :].reshape(num, *added.shape)
    entering = []
    for i in range(num):
        j = num - 1 - i if reverse else i
        entering.append(state)
        state = apply(decays[j], state) + additions[j]
    at = num - 1 - me if reverse else me
    return lax.dynamic_index_in_dim(jnp.stack(entering), at, keepdims=False), state


def align_whole(whole: Array, part: Array, axis: Axis) -> Array:
    """`whole`, which belongs to all of the sequence, varying over the manual mesh axes of `part` but `axis`."""
    return vary(whole, varying_axes(part) - frozenset((axis,) if isinstance(axis, str) else axis))


def id_before(segment_ids: Array, axis: Axis, reverse: bool = False) -> Array:
    """The id of the last real token on the devices before this one, [b]; 0 where there is none."""
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    real = ids != 0
    last = jnp.max(jnp.where(real, jnp.arange(ids.shape[1]), -1), axis=1)
    last_id = jnp.where(last >= 0, jnp.take_along_axis(ids, jnp.maximum(last, 0)[:, None], axis=1)[:, 0], 0)
    gathered = gather_equal(last_id, axis)  # p b
    num, me = gathered.shape[0], lax.axis_index(axis)
    position = jnp.arange(num)
    earlier = position > me if reverse else position < me
    known = earlier[:, None] & (gathered != 0)
    rank = jnp.where(known, (num - 1 - position if reverse else position)[:, None], -1)
    nearest = jnp.argmax(rank, axis=0)
    found = jnp.take_along_axis(gathered, nearest[None], axis=0)[0]
    return jnp.where(known.any(axis=0), found, 0)


def _explicit_mesh(arrays: Sequence[Array | None]) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh, and its explicit axes, of the first array that is sharded over one."""
    for array in arrays:
        if array is not None and any(_spec(array)):
            mesh = jax.typeof(array).sharding.mesh
            axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
            return mesh, tuple(name for name, kind in axes if kind == AxisType.Explicit)
    return None, ()


def _spec(array: Array) -> tuple[str | tuple[str, ...] | None, ...]:
    """The explicit mesh axes of each array axis, as the array's type records them."""
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def _without(array: Array, axis: Axis, mesh: AbstractMesh) -> Array:
    if axis not in _spec(array):
        return array
    return _reshard(array, mesh, PartitionSpec(*(None if entry == axis else entry for entry in _spec(array))))


def _reshard(array: Array, mesh: AbstractMesh, spec: PartitionSpec) -> Array:
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))
