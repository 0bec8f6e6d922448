"""How the TPU's kernels read single rows from HBM: in groups of eight, a ring of them on its way at a time.

A row takes the memory 1 to 4 ns and some 500 ns to arrive, so that a hundred must be under way. The scalar core starts
every copy by itself, which takes it longer than the memory takes: what it does per row decides the speed.
Letters: n rows, a tiles of a row, l lanes of a tile, s slots of the ring, g rows of a group, p pairs.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
GROUP = 8
"""Rows that one semaphore counts: waited for together."""
SLOTS = 16
RING_BYTES = 2 * 2**20

Ref = Any  # a reference of Pallas, which has no public type for all kinds of them
T = TypeVar("T")
V = TypeVar("V")


def row_bytes(row_shape: tuple[int, ...], dtype: Any) -> int:
    """Of a row in VMEM, or somewhat more."""
    tiles = row_shape[0] + -row_shape[0] % 8 if row_shape[0] > 8 else pl.next_power_of_2(row_shape[0])
    return tiles * row_shape[1] * jnp.dtype(dtype).itemsize


def ring_scratch(row_shape: tuple[int, ...], dtype: Any) -> list[Any]:
    """What a `Ring` needs: its memory and a semaphore for each slot, of which there are a power of two."""
    slots = SLOTS
    while slots > 2 and slots * GROUP * row_bytes(row_shape, dtype) > RING_BYTES:
        slots //= 2
    return [pltpu.VMEM((slots, GROUP, *row_shape), dtype), pltpu.SemaphoreType.DMA((slots,))]


@dataclasses.dataclass(frozen=True)
class Ring:
    """Brings groups of rows of `table` [n, a, l] to VMEM; those of group i are `listed(i)` [g] in SMEM."""

    table: Ref
    rows: Ref  # s g a l
    arrived: Ref  # s
    listed: Callable[[Array], Ref]

    def for_each(
        self, num_groups: Array, read: Callable[[Array], V], use: Callable[[V, list[Array], T], T], carry: T
    ) -> T:
        """`carry = use(read(i), rows, carry)` for each group in turn, with its rows as a list of [a, l].

        All that `use` needs from elsewhere is for `read` to read: the compiler moves arithmetic past waits and the
        starts of copies, and no reading.
        """
        ahead = self.rows.shape[0] - 1

        def next_too(i: Array, carry: T) -> T:
            numbers, values = self._numbers(i + ahead), read(i)
            rows = self._wait(i)
            self._start(i + ahead, numbers)
            return use(values, rows, carry)

        def no_next(i: Array, carry: T) -> T:
            values = read(i)
            return use(values, self._wait(i), carry)

        lax.fori_loop(0, jnp.minimum(num_groups, ahead), lambda i, _: self._start(i, self._numbers(i)), None)
        steady = jnp.maximum(num_groups - ahead, 0)
        carry = lax.fori_loop(0, steady, next_too, carry)
        return lax.fori_loop(steady, num_groups, no_next, carry)

    def _numbers(self, i: Array) -> list[Array]:
        listed = self.listed(i)
        return [listed[j] for j in range(GROUP)]

    def _start(self, i: Array, numbers: list[Array]) -> None:
        slot = self._slot(i)
        for j, number in enumerate(numbers):
            pltpu.make_async_copy(self.table.at[number], self.rows.at[slot, j], self.arrived.at[slot]).start()

    def _wait(self, i: Array) -> list[Array]:
        slot = self._slot(i)
        group = self.rows.at[slot]
        pltpu.make_async_copy(group, group, self.arrived.at[slot]).wait()  # for as many bytes as a group has
        return [group[j] for j in range(GROUP)]

    def _slot(self, i: Array) -> Array:
        return i & (self.rows.shape[0] - 1)


def sum_in_pairs(values: list[Array]) -> Array:
    """In as few steps after each other as can be."""
    while len(values) > 1:
        values = [values[j] + values[j + 1] for j in range(0, len(values) - 1, 2)] + values[len(values) & ~1 :]
    return values[0]


def spread_over_lanes(numbers: Ref, rows: Ref) -> None:
    """Number p of `numbers` [p / l, l] into every lane of row p of `rows` [p, l], for a vector to multiply with."""
    for j in range(numbers.shape[0]):
        rows[pl.ds(j * LANES, LANES)] = jnp.broadcast_to(numbers[pl.ds(j, 1)], (LANES, LANES)).T


def sum_over_lanes(rows: Ref, numbers: Ref) -> None:
    """The sum of row p of `rows` [p, l] as number p of `numbers` [p / l, l]."""
    for j in range(numbers.shape[0]):
        numbers[pl.ds(j, 1)] = jnp.sum(rows[pl.ds(j * LANES, LANES)].T, axis=0, keepdims=True)
