"""The JAX API that changes between releases, in one place. Serves jax 0.10 and newer."""

import io
import pickle
from collections.abc import Sequence
from typing import Any, TypeVarTuple, cast

import jax
from jax import Array
from jax.experimental import serialize_executable as _serialize

Arrays = TypeVarTuple("Arrays")  # of Array or Array | None


def align_varying(*arrays: *Arrays) -> tuple[*Arrays]:
    """The arrays, all varying over every manual mesh axis that any of them varies over.

    Inside `jax.shard_map` a loop carry must vary over the same axes before and after a step; outside nothing changes.
    """
    given = cast(tuple[Array | None, ...], arrays)
    axes = frozenset().union(*(varying_axes(array) for array in given if array is not None))
    return cast(tuple[*Arrays], tuple(array if array is None else vary(array, axes) for array in given))


def varying_axes(array: Array) -> frozenset[str]:
    """The manual mesh axes over which `array` differs between devices."""
    return frozenset(jax.typeof(array).mat.varying)


def vary(array: Array, axes: frozenset[str]) -> Array:
    """`array`, varying over these manual mesh axes at least."""
    missing = axes - varying_axes(array)
    return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array


def out_struct(shape: Sequence[int], dtype: Any, *like: Array) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a Pallas result that varies over every manual mesh axis that one of `like` varies over."""
    axes = frozenset().union(*(varying_axes(array) for array in like))
    kind = jax.sharding.ManualAxisType(varying=axes)
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=kind)


def gather_equal(array: Array, axis: str | tuple[str, ...]) -> Array:
    """[devices of `axis`, ...]: every device's `array`, and known to be the same on all of them."""
    return jax.lax.all_gather(array, axis, to="invarying")


class PayloadError(ValueError):
    """What should be a serialised executable is none that this JAX would have written."""


# Everything that JAX's serialisation of an executable of arrays on a mesh is made of.
_PAYLOAD_CLASSES = frozenset(
    {
        ("jax", "P"),
        ("jax._src.core", "ManualAxisType"),
        ("jax._src.core", "MemorySpace"),
        ("jax._src.core", "ShapedArray"),
        ("jax._src.interpreters.pxla", "AllArgsInfo"),
        ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
        ("jax._src.layout", "AutoLayoutSingleton"),
        ("jax._src.layout", "Layout"),
        ("jax._src.linear_util", "DebugInfo"),
        ("jax._src.mesh", "AbstractDevice"),
        ("jax._src.mesh", "AbstractMesh"),
        ("jax._src.mesh", "AxisType"),
        ("jax._src.mesh", "Mesh"),
        ("jax._src.named_sharding", "_unpickle_named_sharding"),
        ("jax._src.stages", "ArgInfo"),
        ("jaxlib._jax", "DeviceList"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy._core.multiarray", "_reconstruct"),
    }
)


class _PayloadUnpickler(_serialize._JaxPjrtUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PAYLOAD_CLASSES:
            raise PayloadError(f"holds {module}.{name}, which no executable is made of")
        return super().find_class(module, name)


def serialize_executable(compiled: jax.stages.Compiled) -> bytes:
    """Without the trees of its arguments and results: those of what it was lowered from say them."""
    return _serialize.serialize(compiled)[0]


def deserialize_executable(payload: bytes, lowered: jax.stages.Lowered, devices: Sequence[Any]) -> jax.stages.Compiled:
    """The executable on `devices`, for arguments like those that `lowered` was made with.

    The payload is a pickle. Nothing is looked up for it but the classes that executables are made of.
    Raises PayloadError where it asks for others, or cannot be read.
    """
    client = devices[0].client
    try:
        unloaded, args_info, no_kwargs = _PayloadUnpickler(io.BytesIO(payload), client, devices).load()
        executable = unloaded.load()
    except PayloadError:
        raise
    except (
        *(pickle.UnpicklingError, jax.errors.JaxRuntimeError),
        *(AttributeError, EOFError, LookupError, TypeError, ValueError),
    ) as error:
        raise PayloadError(f"cannot be read: {str(error).partition(chr(10))[0]}") from None
    info = jax.tree.unflatten(lowered.in_tree, args_info)
    return jax.stages.Compiled(executable, [], info, lowered.out_tree, no_kwargs=no_kwargs)
