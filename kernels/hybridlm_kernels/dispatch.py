"""Which implementation an operation takes, and how it runs on sharded operands. Letters: b batch, t time, d channels.

`impl` is "auto", "reference" (token by token, the oracle), "chunked" (plain JAX, efficient on every platform),
"pallas_tpu" or "pallas_gpu". A named implementation that cannot serve raises `UnsupportedKernel`; "auto" always serves.
"""

import dataclasses
import difflib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import cast

import jax
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

IMPLS = ("auto", "reference", "chunked", "pallas_tpu", "pallas_gpu")
OPS = {  # the implementations that exist
    "linear_scan": ("reference", "chunked"),
    "short_conv": ("reference", "chunked"),
}
DTYPES = ("bfloat16", "float16", "float32", "float64")
COMPLEX_DTYPES = ("complex64", "complex128")

logger = logging.getLogger("hybridlm_kernels")


class UnsupportedKernel(NotImplementedError):
    """The implementation asked for by name cannot serve this call."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation that `op` takes and the reasons for it."""

    op: str
    impl: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.op}: {self.impl} ({'; '.join(self.reasons)})"


def explain(op: str, *operands: Array | jax.ShapeDtypeStruct, impl: str = "auto") -> Explanation:
    """Which implementation `op` takes for these operands (arrays or `jax.ShapeDtypeStruct`s, time in axis 1), and why.

    Raises UnsupportedKernel when `impl` names one that cannot serve, ValueError for an unknown `op` or `impl`.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r}: must be one of {', '.join(OPS)}{_suggestion(op, OPS)}")
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: must be one of {', '.join(IMPLS)}{_suggestion(impl, IMPLS)}")
    if impl == "auto":
        if operands and operands[0].shape[1:2] == (1,):
            return Explanation(op, "chunked", ("one token is evaluated directly, without a loop",))
        return Explanation(op, "chunked", ("the fastest implementation of this operation on every platform",))
    if impl not in OPS[op]:
        raise UnsupportedKernel(f"impl={impl!r}: not implemented for {op}; use auto")
    return Explanation(op, impl, ("asked for by name",))


def choose(op: str, *operands: Array | jax.ShapeDtypeStruct, impl: str) -> str:
    """The implementation to run, never "auto"; the first automatic choice of each kind is logged."""
    explanation = explain(op, *operands, impl=impl)
    if impl == "auto":
        _log_once(explanation)
    return explanation.impl


@functools.cache
def _log_once(explanation: Explanation) -> None:
    logger.info("%s", explanation)


def _suggestion(word: str, known: Sequence[str] | dict[str, tuple[str, ...]]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def check_operand(name: str, array: Array, shape: tuple[int, ...], dims: str, allow_complex: bool = False) -> None:
    """Raises ValueError unless `array` has this shape, named by `dims`, and a floating dtype that is supported."""
    if array.shape != shape:
        raise ValueError(f"{name}: shape {array.shape} must be {dims} = {shape}")
    known = DTYPES + COMPLEX_DTYPES if allow_complex else DTYPES
    if array.dtype.name not in known:
        raise ValueError(f"{name}: dtype {array.dtype.name} must be one of {', '.join(known)}")


def check_sequence(name: str, array: Array) -> None:
    """Raises ValueError unless `array` is [batch, time, channels] with at least one time step."""
    if array.ndim != 3:
        raise ValueError(f"{name}: shape {array.shape} must be [batch, time, channels]")
    if array.shape[1] == 0:
        raise ValueError(f"{name}: shape {array.shape} has no time step; at least one token is needed")


def local(
    function: Callable[..., tuple[Array, ...]], operands: Sequence[tuple[Array | None, str]], results: Sequence[str]
) -> tuple[Array, ...]:
    """`function(*operands)` run by every device on its own shard, without gathering anything that is sharded.

    Each operand comes with one letter per axis, such as "btd"; `results` names the axes of what comes back. The first
    operand decides how a letter is sharded and the others are resharded to agree. Without sharded operands, with
    automatic axes, or inside a `jax.shard_map`, this is a plain call. Raises ValueError where time (t) is sharded.
    """
    arrays = [array for array, _ in operands]
    mesh, explicit = _explicit_mesh(arrays)
    if mesh is None:
        return function(*arrays)
    leader, letters = operands[0]
    assert leader is not None, "the first operand decides the sharding"
    of_letter = dict(zip(letters, _spec(leader), strict=True))
    if of_letter.get("t") is not None:
        raise ValueError(
            f"x: its time axis is sharded over {of_letter['t']!r}, but a recurrence over a sharded time axis is not"
            " supported; shard batch or channels instead"
        )

    def agreed(names: str) -> PartitionSpec:
        return PartitionSpec(*(of_letter.get(name) for name in names))

    placed = [
        array if array is None or _spec(array) == tuple(agreed(names)) else _reshard(array, mesh, agreed(names))
        for array, names in operands
    ]
    if not any(of_letter.values()):
        return function(*placed)
    out_specs = tuple(agreed(names) for names in results)
    if AxisType.Manual in mesh.axis_types:
        # The gradient of a shard_map within another over different axes fails to lower (jax 0.10 to 0.12), so the
        # compiler divides the work over the axes that are left.
        automatic = jax.sharding.auto_axes(function, axes=explicit, out_sharding=out_specs)
        return cast(tuple[Array, ...], automatic(*placed))
    in_specs = tuple(agreed(names) for _, names in operands)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(explicit))(*placed)


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


def _reshard(array: Array, mesh: AbstractMesh, spec: PartitionSpec) -> Array:
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))
