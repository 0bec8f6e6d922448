"""What the TPU's scan kernels share: blocks, rows, masks. Letters: b batch, t time, d channels.

A grid step holds a block [rows, lanes] of an array in its natural [b, t, d] layout; time is the innermost grid axis and
the state goes from block to block in VMEM. Within a block, groups of 16 rows (a tile of bfloat16) are unpacked to
float32 scratch at once, scanned row by row, and packed again: a row's strided load puts 1024 channels in one register,
so that a row costs little more than its loads and its store.

Every function takes tuples of planes (see planes.py): Mosaic has no complex numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.planes import Planes, plus, times
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET

GROUP = 16  # rows of a bfloat16 tile
LANES = 128
SLICE = 256
SLOTS = 2
ABSENT = 3  # kind of a row beyond the end of time: padding whose every operand is garbage
MAX_ROWS, MAX_LANES = 512, 4096
VMEM_BUDGET = 13 * 2**20  # of the 16 MiB that v4 and v5e give a kernel by default; the compiler keeps some itself

Refs = tuple[Any, ...]
Step = Callable[[Planes, Planes, Planes], tuple[Planes, Planes]]  # decay, value, carry -> carry, row to store


@dataclass(frozen=True)
class Tiling:
    """Blocks of [b, t, d] and the order in which a grid visits them, `backward` from the end of time."""

    b: int
    t: int
    d: int
    rows: int
    lanes: int
    backward: bool

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.b, pl.cdiv(self.d, self.lanes), self.steps

    @property
    def steps(self) -> int:
        return pl.cdiv(self.t, self.rows)

    @property
    def is_ragged(self) -> bool:
        return self.t % self.rows != 0

    def time(self, k: Array | int) -> Array | int:
        """The block of time at grid step k."""
        return self.steps - 1 - k if self.backward else k

    def tokens(self) -> pl.BlockSpec:
        """Blocks of [b, t, d]."""
        return pl.BlockSpec((None, self.rows, self.lanes), lambda i, j, k: (i, self.time(k), j))

    def group_before(self, reverse: bool) -> pl.BlockSpec:
        """The group of [b, t, d] that a scan has passed just before it enters the block; any group at its start."""
        per_block, last = self.rows // GROUP, pl.cdiv(self.t, GROUP) - 1

        def index(i: Array, j: Array, k: Array) -> tuple[Array, Array, Array]:
            first = self.time(k) * per_block
            return i, jnp.minimum(first + per_block, last) if reverse else jnp.maximum(first - 1, 0), j

        return pl.BlockSpec((None, GROUP, self.lanes), index)

    def channels(self) -> pl.BlockSpec:
        """Blocks of [b, 1, d], the same for all of time."""
        return pl.BlockSpec((None, 1, self.lanes), lambda i, j, k: (i, 0, j))

    def weights(self) -> pl.BlockSpec:
        """Blocks of [1, d]."""
        return pl.BlockSpec((1, self.lanes), lambda i, j, k: (0, j))

    def kinds(self, kinds: Array | None) -> pl.BlockSpec | None:
        """Blocks of `lay_out`'s result."""
        return (
            None
            if kinds is None
            else pl.BlockSpec((None, None, 1, self.kind_lanes), lambda i, j, k: (i, self.time(k), 0, 0))
        )

    @property
    def kind_lanes(self) -> int:
        return pl.cdiv(self.rows, LANES) * LANES

    def lay_out(self, kinds: Array | None) -> Array | None:
        """Kinds [b, t] as [b, steps, 1, lanes] int32, so that a block is a row; beyond t all are ABSENT."""
        if kinds is None and not self.is_ragged:
            return None
        kinds = jnp.full((self.b, self.t), CONTINUE) if kinds is None else kinds
        after = self.steps * self.rows - self.t
        kinds = jnp.pad(kinds.astype(jnp.int32), ((0, 0), (0, after)), constant_values=ABSENT)
        kinds = kinds.reshape(self.b, self.steps, 1, self.rows)
        return jnp.pad(kinds, ((0, 0), (0, 0), (0, 0), (0, self.kind_lanes - self.rows)), constant_values=ABSENT)

    def groups(self, planes: int) -> tuple[Any, ...]:
        """Scratch for the groups that are scanned together, per plane."""
        return (pltpu.VMEM((SLOTS * GROUP, self.lanes), jnp.float32),) * planes

    def halves(self, planes: int) -> tuple[Any, ...]:
        """Scratch of 8 rows, per plane."""
        return (pltpu.VMEM((8, self.lanes), jnp.float32),) * planes

    def carries(self, planes: int) -> tuple[Any, ...]:
        return (pltpu.VMEM((1, self.lanes), jnp.float32),) * planes

    def spread(self, kinds: Array | None) -> Any | None:
        """Scratch for the kinds of a block, where there are any."""
        return None if kinds is None else pltpu.VMEM((self.kind_lanes, LANES), jnp.int32)

    def params(self) -> pltpu.CompilerParams:
        return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def tiling(streams: Sequence[Any], *, scratch: int, backward: bool) -> Tiling:
    """The largest blocks that fit: `streams` are the arrays [b, t, d] in HBM, `scratch` counts planes of groups."""
    b, t, d = streams[0].shape
    width = sum(jnp.dtype(stream.dtype).itemsize for stream in streams)
    splits = pl.cdiv(d, MAX_LANES)
    if b * splits % 2 and d >= 2048:  # v4 and v5p give each of two cores half of the parallel grid
        splits += 1
    lanes = d if d < LANES else pl.cdiv(pl.cdiv(d, splits), LANES) * LANES

    def vmem(rows: int) -> int:
        return lanes * (2 * rows * width + 4 * SLOTS * GROUP * scratch) + 4 * LANES * max(rows, LANES)

    fitting = [rows for rows in (512, 256, 128, 64, 32, 16) if rows < t + GROUP and vmem(rows) <= VMEM_BUDGET] or [
        GROUP
    ]
    even = [rows for rows in fitting if t % rows == 0 and 4 * rows >= fitting[0]]
    return Tiling(b, t, d, (even or fitting)[0], lanes, backward)


def start(carry: Refs, state: Refs) -> None:
    """At the first block of time, the state given."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for ref, plane in zip(carry, state, strict=True):
            ref[...] = plane[...]


def finish(carry: Refs, last: Refs) -> None:
    """At the last block of time, the state reached."""

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        for ref, plane in zip(last, carry, strict=True):
            ref[...] = plane[...]


def start_summary(decay: Refs, added: Refs) -> None:
    """At the first block of time, what no token does: decay 1, nothing added."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for i, ref in enumerate((*decay, *added)):
            ref[...] = jnp.full(ref.shape, 1.0 if i == 0 else 0.0, jnp.float32)


def forwards(decay: Planes, value: Planes, state: Planes) -> tuple[Planes, Planes]:
    """h_t = a_t h_{t-1} + x_t."""
    state = plus(times(decay, state), value)
    return state, state


def adjoint(decay: Planes, value: Planes, carry: Planes) -> tuple[Planes, Planes]:
    """u_t = dh_t + c, and c = a_t u_t goes on to the token before."""
    u = plus(value, carry)
    return times(decay, u), u


def total(step: Step, planes: int) -> Step:
    """`step`, with the product of the decays carried beside the state and nothing to store.

    The product comes first in the carry, in `planes` planes.
    """

    def step_with_product(decay: Planes, value: Planes, carry: Planes) -> tuple[Planes, Planes]:
        return times(decay, carry[:planes]) + step(decay, value, carry[planes:])[0], ()

    return step_with_product


def scan_rows(step: Step, decays: Refs, values: Refs, slot: int, carry: Planes, backward: bool) -> Planes:
    """Scans the group at row `slot` of the scratch row by row and leaves the results where the values were."""
    for row in range(GROUP)[:: -1 if backward else 1]:
        at = pl.ds(slot + row, 1)
        carry, stored = step(tuple(ref[at, :] for ref in decays), tuple(ref[at, :] for ref in values), carry)
        for ref, plane in zip(values, stored, strict=False):
            ref[at, :] = plane
    return carry


def over_groups(rows: int, backward: bool, body: Callable[[Array, int, Planes], Planes], carry: Refs) -> None:
    """`body(first row, slot, state)` for every group of a block; the state comes from `carry` and returns there.

    Neighbouring groups have slots of their own in the scratch: one is unpacked while the other's rows are scanned.
    """
    number = rows // GROUP
    slots = max(n for n in range(1, SLOTS + 1) if number % n == 0)

    def groups(i: Array, state: Planes) -> Planes:
        for slot in range(slots):
            group = i * slots + slot
            first = (number - 1 - group if backward else group) * GROUP
            state = body(pl.multiple_of(first, GROUP), slot * GROUP, state)
        return state

    state = lax.fori_loop(jnp.int32(0), jnp.int32(number // slots), groups, tuple(ref[...] for ref in carry))
    for ref, plane in zip(carry, state, strict=True):
        ref[...] = plane


def spread_kinds(kinds_ref: Any, spread_ref: Any) -> None:
    """Turns a row of kinds into a column that is the same in all 128 lanes."""
    if kinds_ref is None:
        return
    for first in range(0, kinds_ref.shape[1], LANES):
        at = pl.ds(first, LANES)
        spread_ref[at, :] = jnp.broadcast_to(kinds_ref[:, at], (LANES, LANES)).T


def kinds_of(spread_ref: Any, first: Array, at: Any) -> Array | None:
    """Kinds of a group in the lanes `at`, [GROUP, lanes]."""
    if spread_ref is None:
        return None
    kinds = spread_ref[pl.ds(first, GROUP), :]
    return jnp.tile(kinds, (1, pl.cdiv(at.size, LANES)))[:, : at.size]


def kept(decay: Planes, kinds: Array | None) -> Planes:
    """The decay of a token: 0 where a document starts, 1 at padding."""
    if kinds is None:
        return decay
    return tuple(
        jnp.where(kinds == RESET, 0.0, jnp.where(kinds >= PADDING, 1.0 - i, plane)) for i, plane in enumerate(decay)
    )


def masked(planes: Planes, kinds: Array | None, first_masked: int) -> Planes:
    """Zeros at every kind from `first_masked` on: PADDING, or ABSENT for what padding passes through."""
    return planes if kinds is None else tuple(jnp.where(kinds >= first_masked, 0.0, plane) for plane in planes)


def lane_slices(refs: Refs) -> list[Any]:
    """A block's lanes, few enough at a time for a group's values to stay in registers."""
    lanes = refs[0].shape[1]
    return [pl.ds(first, min(SLICE, lanes - first)) for first in range(0, lanes, SLICE)]


def load(refs: Refs, first: Array | int, at: Any) -> Planes:
    """A group of a block in the lanes `at`, in float32."""
    return tuple(ref[pl.ds(first, GROUP), at].astype(jnp.float32) for ref in refs)


def store(refs: Refs, first: Array | int, at: Any, planes: Planes) -> None:
    for ref, plane in zip(refs, planes, strict=False):
        ref[pl.ds(first, GROUP), at] = plane.astype(ref.dtype)


class Before:
    """The states before the tokens of a block's groups, from the block of states `h`.

    Before the block's own first token: what the scan `passed` last, [GROUP, lanes], or h0 where the scan starts with
    this block. `edges` is scratch that holds it, [8, lanes].
    """

    def __init__(
        self, h: Refs, passed: Refs, h0: Refs, edges: Refs, spread: Any, *, reverse: bool, is_start: Array
    ) -> None:
        self.h, self.h0, self.edges, self.spread, self.reverse = h, h0, edges, spread, reverse
        for edge, group, state in zip(edges, passed, h0, strict=True):
            edge[...] = jnp.where(is_start, state[...], self._half(group[...].astype(jnp.float32)))

    def __call__(self, first: Array, at: Any) -> Planes:
        """For the group at row `first`, in the lanes `at`."""
        rows = self.h[0].shape[0]
        at_edge = first == (rows - GROUP if self.reverse else 0)
        away = GROUP if self.reverse else -GROUP
        neighbour = pl.multiple_of(jnp.clip(first + away, 0, rows - GROUP), GROUP)
        groups, others = self._present(first, at), self._present(neighbour, at)
        return tuple(
            self._shift(group, jnp.where(at_edge, edge[:, at], self._half(other)))
            for group, other, edge in zip(groups, others, self.edges, strict=True)
        )

    def _present(self, first: Array, at: Any) -> Planes:
        """A group of states; h0 in place of what lies beyond the end of time, where a reversed scan starts."""
        planes, kinds = load(self.h, first, at), kinds_of(self.spread, first, at)
        if not self.reverse or kinds is None:
            return planes
        return tuple(jnp.where(kinds == ABSENT, h0[:, at], plane) for plane, h0 in zip(planes, self.h0, strict=True))

    def _half(self, group: Array) -> Array:
        return group[:8] if self.reverse else group[8:]

    def _shift(self, group: Array, half: Array) -> Array:
        if self.reverse:
            return pltpu.roll(jnp.concatenate([group, half]), GROUP + 7, 0)[:GROUP]
        return pltpu.roll(jnp.concatenate([half, group]), 1, 0)[8:]
