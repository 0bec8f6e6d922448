"""Device mesh from config, logical axis rules, and parameters that are born sharded.

Modules name the axes of their arrays logically (`("embed", "mlp")`); this file alone says which mesh axes those are.
Explicit sharding is used throughout: it is part of an array's type, and an ambiguous layout fails when traced.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from hybridlm import config
from hybridlm.config_check import ConfigError

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "expert", "tensor")

# Logical axis -> mesh axes. An axis that is not listed is replicated.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp", "expert"),
    "experts": ("expert",),
    "expert_embed": ("fsdp",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "lru": ("tensor",),
    # Rows over all axes and whole embeddings: a table sharded over `embed` too makes XLA copy it whole on lookup.
    "vocab": ("fsdp", "expert", "tensor"),
    "logits": ("tensor",),
    "replicas": ("data",),
    # Of memories' tables, by how they are spread: (rows, columns) are (table_rows, None), (grid_rows, grid_columns) or
    # (tensor_rows, table_columns).
    "table_rows": ("fsdp", "expert", "tensor"),
    "table_columns": ("fsdp", "expert"),
    "grid_rows": ("fsdp", "tensor"),
    "grid_columns": ("expert",),
    "tensor_rows": ("tensor",),
}


def mesh_shape(mesh: config.Mesh, num_devices: int) -> tuple[int, ...]:
    """Sizes of `MESH_AXES` for `num_devices` devices.

    Raises ConfigError where the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    text = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if num_devices % fixed or (-1 not in sizes and fixed != num_devices):
        relation = "divide" if -1 in sizes else "equal"
        raise ConfigError(
            "sharding.mesh",
            f": {text} needs {fixed} devices, which must {relation} the {num_devices} there are; set one axis to -1",
        )
    return tuple(num_devices // fixed if size == -1 else size for size in sizes)


def make_mesh(mesh: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The run's device mesh, with explicit axis types. Enter it with `jax.set_mesh`."""
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(mesh, len(devices))
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=devices)


def check_batch(train: config.Train, mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError where the devices of the batch axis cannot share the batch evenly."""
    parts = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    rows = train.batch_size // train.num_microbatches
    if rows % parts:
        axes = " x ".join(RULES["batch"])
        raise ConfigError(
            "train.batch_size",
            f"={train.batch_size}: {rows} sequences per microbatch must divide by {axes} = {parts} devices",
        )


def spec(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names, on the mesh in scope."""
    return PartitionSpec(*(RULES.get(name) if name else None for name in logical))


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
