"""Device mesh from config, logical axis rules, and parameters that are born sharded.

Modules name the axes of their arrays logically (`("embed", "mlp")`); this file alone says which mesh axes those are.
Explicit sharding is used throughout: it is part of an array's type, and an ambiguous layout fails when traced.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

from hybridlm import config
from hybridlm.config_check import ConfigError

T = TypeVar("T")

MESH_AXES = ("slices", "data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes. An axis that is not listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    # Where time is cut, a sequence is on the devices of `time`; token by token, each of these has rows of its own.
    "sequences": ("slices", "data", "fsdp", "expert"),
    "time": ("context",),
    "batch": ("slices", "data", "fsdp", "expert", "context"),
    "embed": ("fsdp", "expert", "context"),
    "experts": ("expert",),
    "expert_embed": ("fsdp", "context"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "lru": ("tensor",),
    # Rows over all axes and whole embeddings: a table sharded over `embed` too makes XLA copy it whole on lookup.
    "vocab": ("fsdp", "expert", "context", "tensor"),
    "logits": ("tensor",),
    "replicas": ("slices", "data", "context"),
    # Of memories' tables, by how they are spread: (rows, columns) are (table_rows, None), (grid_rows, grid_columns) or
    # (tensor_rows, table_columns).
    "table_rows": ("fsdp", "expert", "tensor"),
    "table_columns": ("fsdp", "expert"),
    "grid_rows": ("fsdp", "tensor"),
    "grid_columns": ("expert",),
    "tensor_rows": ("tensor",),
}


def mesh_shape(mesh: config.Mesh, num_devices: int, num_slices: int = 1) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` for `num_devices` devices of `num_slices` slices.

    Raises ConfigError where the sizes do not multiply to the number of devices.
    """
    sizes = [num_slices if mesh.slices == -1 else mesh.slices, *(getattr(mesh, axis) for axis in MESH_AXES[1:])]
    fixed = math.prod(size for size in sizes if size != -1)
    text = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1) or "no axis"
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        relation = "divide" if -1 in sizes else "equal"
        raise ConfigError(
            "sharding.mesh",
            f": {text} needs {fixed} devices, which must {relation} the {num_devices} there are; set one axis to -1",
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def mesh_text(sizes: Mapping[str, int]) -> str:
    """`data 2, fsdp 8`: the axes of more than one device."""
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"


def make_mesh(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The run's device mesh, with explicit axis types. Enter it with `jax.set_mesh`."""
    devices = jax.devices() if devices is None else devices
    num_slices = count_slices(devices)
    shape = mesh_shape(mesh, len(devices), num_slices)
    kinds = (AxisType.Explicit,) * len(shape)
    if num_slices == 1:
        # An axis may lie along a part of one of the torus: tensor=2 in a cube of 4x4x4 chips.
        return Mesh(create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH_AXES, axis_types=kinds)
    if shape[0] != num_slices:
        raise ConfigError(
            "sharding.mesh.slices", f"={shape[0]}: the devices are of {num_slices} slices; leave it at -1"
        )
    within, between = (1, *shape[1:]), (num_slices, *(1 for _ in shape[1:]))
    places = create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return Mesh(places, MESH_AXES, axis_types=kinds)


def count_slices(devices: Sequence[Any]) -> int:
    """How many TPU slices they are of."""
    return len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1


def check_batch(run: config.Config, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError where the devices cannot share the batch, or the time of its sequences, evenly."""
    parts = math.prod(mesh.shape[axis] for axis in RULES["sequences"])
    rows = run.train.batch_size // run.train.num_microbatches
    if rows % parts:
        axes = " x ".join(RULES["sequences"])
        raise ConfigError(
            "train.batch_size",
            f"={run.train.batch_size}: {rows} sequences per microbatch must divide by {axes} = {parts} devices",
        )
    parts = mesh.shape["context"]
    if run.data.seq_len % parts:
        raise ConfigError(
            "data.seq_len", f"={run.data.seq_len}: must divide by sharding.mesh.context = {parts} devices"
        )


def spec(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names, on the mesh in scope.

    Mesh axes of one device are left out: they cut nothing. Raises RuntimeError where no mesh is in scope; functions of
    arrays that also run without one ask `out_sharding`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        raise RuntimeError(f"the spec of {logical} depends on the mesh, and none is in scope: enter jax.set_mesh(mesh)")
    return PartitionSpec(*((mesh_axes(name) or None) if name else None for name in logical))


def mesh_axes(logical: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is spread over: those of more than one device."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in RULES.get(logical, ()) if shape.get(axis, 1) > 1)


def axis_size(logical: str) -> int:
    """Number of parts that a logical axis is split into on the mesh in scope (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES[logical])


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x` laid out by the rules; itself where no mesh is in scope."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, spec(*logical))


def out_sharding(*logical: str | None) -> PartitionSpec | None:
    """The `out_sharding=` of an operation whose result has these axes; None where no mesh is in scope."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(*logical)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable[..., jax.Array]
) -> nnx.Param[jax.Array]:
    """A float32 parameter, initialised in the layout that the rules give its axes.

    Raises ConfigError where an axis does not divide by the devices it is spread over.
    """
    for size, axis in zip(shape, axes, strict=True):
        if axis is not None and size % (parts := axis_size(axis)):
            mesh_axes = " x ".join(RULES[axis])
            raise ConfigError(
                "sharding.mesh",
                f": {mesh_axes} = {parts} must divide every {axis!r} axis of the model, and one has size {size}; "
                "choose a smaller mesh axis or another size",
            )
    value = init(rngs.params(), shape, jnp.float32)
    return nnx.Param(constrain(value, *axes))


def total(x: jax.Array, logical: str) -> jax.Array:
    """The sum over the devices that a logical axis is spread over, inside `per_device`; `x` where there is no mesh."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.psum(x, RULES[logical])


def position(logical: str) -> jax.Array | int:
    """Which part of a logical axis this device has, inside `per_device`; 0 where there is no mesh."""
    return 0 if jax.sharding.get_abstract_mesh().empty else jax.lax.axis_index(RULES[logical])


def fold_time(x: Shaped[Array, "b t *rest"]) -> Shaped[Array, "n s *rest"]:
    """[b, t, ...] whose time is cut over p devices as [b p, t / p, ...]: a row is what one device has of a sequence.

    Nothing moves. What is not cut stays as it is.
    """
    if not is_time_cut(x):
        return x
    entries = _entries(x)
    x = jax.sharding.reshard(x, PartitionSpec(*spec("sequences", "time"), *entries[2:]))
    return jax.shard_map(lambda x: x, out_specs=PartitionSpec(*spec("batch", None), *entries[2:]))(x)


def unfold_time(x: Shaped[Array, "n s *rest"]) -> Shaped[Array, "b t *rest"]:
    """The inverse of `fold_time`."""
    if jax.sharding.get_abstract_mesh().empty or axis_size("time") == 1:
        return x
    entries = _entries(x)
    x = jax.sharding.reshard(x, PartitionSpec(*spec("batch", None), *entries[2:]))
    return jax.shard_map(lambda x: x, out_specs=PartitionSpec(*spec("sequences", "time"), *entries[2:]))(x)


def is_time_cut(x: Shaped[Array, "b t *_"]) -> bool:
    return _entries(x)[1] is not None


def folded_shape(batch: int, length: int) -> tuple[int, int]:
    """What `fold_time` makes of [batch, length]."""
    parts = axis_size("time")
    return batch * parts, length // parts


def _entries(x: Array) -> tuple[Any, ...]:
    """The mesh axes of each axis of `x`, as its type records them."""
    entries = tuple(jax.typeof(x).sharding.spec)
    return entries + (None,) * (x.ndim - len(entries))


def per_device(f: Callable[..., T], in_axes: Any, out_axes: Any) -> Callable[..., T]:
    """`f` run on each device's part of its operands, with no communication but its own; plain `f` without a mesh.

    `in_axes` and `out_axes` are pytrees (prefixes) of tuples of logical axes, one tuple per array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f
    in_specs, out_specs = jax.tree.map(lambda axes: spec(*axes), (in_axes, out_axes), is_leaf=_is_axes)
    local = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def run(*args: Any) -> T:
        def place(axes: tuple[str | None, ...], part: Any) -> Any:
            return jax.tree.map(lambda x: constrain(x, *axes), part)

        return local(*jax.tree.map(place, in_axes, args, is_leaf=_is_axes))

    return run


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(axis is None or isinstance(axis, str) for axis in x)
