"""The JAX API that changes between releases, in one place. Serves jax 0.10 and newer."""

from collections.abc import Sequence
from typing import Any, TypeVarTuple, cast

import jax
from jax import Array

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
