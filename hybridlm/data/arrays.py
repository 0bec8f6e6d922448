"""Rows that this host holds of a batch, and global arrays made of them. Letters: r rows, t time."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int64

Batch = dict[str, jax.Array]


def local_rows(sharding: NamedSharding | None, batch_size: int, seq_len: int) -> Int64[np.ndarray, " r"]:
    """Rows of the global batch that this host's devices hold, ascending."""
    if sharding is None:
        return np.arange(batch_size)
    held = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size, seq_len)).values():
        assert index is not None
        held[index[0]] = True
    return np.flatnonzero(held)


def assemble(
    local: Mapping[str, np.ndarray], rows: Int64[np.ndarray, " r"], batch_size: int, sharding: NamedSharding | None
) -> Batch:
    """Global arrays of which `local` holds `rows`."""
    if sharding is None:
        return jax.device_put(dict(local))

    def globally(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start, *index[1:]]

        return jax.make_array_from_callback((batch_size, array.shape[1]), sharding, part)

    return {name: globally(array) for name, array in local.items()}
