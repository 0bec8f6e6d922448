"""Rows times their group's matrix on Hopper GPUs: y = x w[g] and, with the matrices transposed, dx = dy w[g]^T.

Letters: m rows, g groups, k what is summed over, n output columns, v visits.

A visit is 128 rows, of which some range belongs to one group. A group's visits begin at its first row, rounded down to
a multiple of 8 (see `gpu_stages`), so that all but the first and the last one are whole. Neighbouring groups may visit
the same rows: each writes its own. Rows of no group are a group too, one that nothing is multiplied for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.grouped_matmul.gpu_stages import (
    ALIGNMENT,
    BLOCK,
    CONSUMERS,
    STAGES,
    Ref,
    Ring,
    barriers,
    each_item,
    launch,
    operands,
    outputs,
    spans,
    tile_width,
    work,
)

ROWS = CONSUMERS * BLOCK  # of a visit
PANEL = 8  # neighbouring tiles of columns that are computed together, for the rows' sake; more would evict the matrices


@dataclasses.dataclass(frozen=True)
class Visits:
    """What is to be done. `table` [4, v] int32 has the group and the first row of each visit, and of its 128 rows the
    first one that belongs to the group and the first one past it."""

    table: Array
    count: Array  # [1] int32, how many visits there are

    @staticmethod
    def of(group_sizes: Array, m: int) -> "Visits":
        begin, first, end = spans(jnp.append(group_sizes, m), m)  # the last one is of all rows that are left
        visits = jnp.where(end > first, (end + ROWS - 1) // ROWS, 0)
        visits_end = jnp.cumsum(visits)
        number = jnp.arange(most_visits(m, group_sizes.size), dtype=jnp.int32)
        group = (number[:, None] >= visits_end[None, :-1]).sum(1)
        skipped = (number - (visits_end - visits)[group]) * ROWS
        low, high = jnp.maximum(first[group] - skipped, 0), jnp.minimum(end[group] - skipped, ROWS)
        return Visits(
            jnp.stack([group, begin[group] + skipped, low, high]).astype(jnp.int32), visits_end[-1:].astype(jnp.int32)
        )


def most_visits(m: int, num_groups: int) -> int:
    return (m + (num_groups + 1) * (ROWS + ALIGNMENT)) // ROWS


def multiply(x: Array, w: Array, group_sizes: Array, *, transposed: bool) -> Array:
    """y [m, n] of x [m, k] and w [g, k, n], or [g, n, k] where `transposed`. w in x's dtype, m a multiple of 8."""
    (m, k), num_groups, n = x.shape, w.shape[0], w.shape[1 if transposed else 2]
    most = most_visits(m, num_groups)
    width = tile_width(n, most)
    tiles, steps = pl.cdiv(n, width), k // BLOCK
    visits = Visits.of(group_sizes, m)

    def kernel(
        x_ref: Ref,
        w_ref: Ref,
        table: Ref,
        count: Ref,
        y_ref: Ref,
        x_blocks: Ref,
        w_blocks: Ref,
        sent: Ref,
        full: Ref,
        empty: Ref,
    ) -> None:
        ring, items = Ring(full, empty), count[0] * tiles

        def visit_and_tile(item: Array) -> tuple[Array, Array]:
            """Items go through the columns of a panel, then through the visits, then through the panels."""
            panel = lax.div(item, count[0] * PANEL)
            item = item - panel * count[0] * PANEL
            panel_width = jnp.minimum(PANEL, tiles - panel * PANEL)
            visit = lax.div(item, panel_width)
            return visit, panel * PANEL + item - visit * panel_width

        def steps_of(group: Array) -> Array:
            return jnp.where(group < num_groups, jnp.int32(steps), 0)

        def fetch(item: Array, step: Array) -> Array:
            visit, tile = visit_and_tile(item)
            group, row = table[0, visit], table[1, visit]
            columns = pl.ds(tile * width, width)

            def copies(i: Array, slot: Array) -> list[tuple[Ref, Ref]]:
                depth = pl.ds(i * BLOCK, BLOCK)
                halves = [pl.ds(row + j * BLOCK, BLOCK) for j in range(CONSUMERS)]
                x_copies = [(x_ref.at[half, depth], x_blocks.at[slot, j]) for j, half in enumerate(halves)]
                matrix = w_ref.at[group, columns, depth] if transposed else w_ref.at[group, depth, columns]
                return [*x_copies, (matrix, w_blocks.at[slot])]

            return ring.fetch(step, steps_of(group), copies)

        def compute(warpgroup: Array, item: Array, step: Array) -> Array:
            visit, tile = visit_and_tile(item)
            group, row, low, high = (table[j, visit] for j in range(4))

            def products(total: Ref, i: Array, slot: Array) -> None:
                matrix = w_blocks.at[slot]
                plgpu.wgmma(total, x_blocks.at[slot, warpgroup], matrix.transpose((1, 0)) if transposed else matrix)

            y = ring.multiply(step, steps_of(group), (BLOCK, width), products).astype(x.dtype)
            skipped = warpgroup * BLOCK
            low, high = jnp.maximum(low - skipped, 0), jnp.minimum(high - skipped, BLOCK)
            pl.when(low < high)(lambda: send(warpgroup, y, row + skipped, low, high - low, tile * width))
            return step + steps_of(group)

        def send(warpgroup: Array, y: Array, row: Array, low: Array, count: Array, first_column: Array) -> None:
            """Rows `low` to `low + count`. The copy engine moves fixed numbers of rows: here powers of 2."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for j in range(width // BLOCK):
                sent[warpgroup, j] = y[:, j * BLOCK : (j + 1) * BLOCK]
            plgpu.commit_smem()

            def copy(some: int) -> None:
                at = low + (count & -2 * some)  # after the larger powers of two in `count`

                def block(j: Array, _: None) -> None:
                    column = first_column + j * BLOCK
                    target = y_ref.at[pl.ds(row + at, some), pl.ds(column, BLOCK)]
                    source = sent.at[warpgroup, j, pl.ds(at, some)]
                    pl.when(column < n)(lambda: plgpu.copy_smem_to_gmem(source, target))

                lax.fori_loop(0, width // BLOCK, block, None)

            for power in reversed(range(BLOCK.bit_length())):
                pl.when(count & 2**power != 0)(functools.partial(copy, 2**power))

        work(
            ring,
            lambda: each_item(items, fetch),
            lambda warpgroup: each_item(items, lambda item, step: compute(warpgroup, item, step)),
        )

    matrix = (width, BLOCK) if transposed else (BLOCK, width)
    scratch = [
        operands(STAGES, CONSUMERS, BLOCK, BLOCK, dtype=x.dtype),
        operands(STAGES, *matrix, dtype=x.dtype),
        outputs(CONSUMERS, width // BLOCK, BLOCK, BLOCK, dtype=x.dtype),
        *barriers(copies=CONSUMERS + 1),
    ]
    name = "grouped_matmul_transposed" if transposed else "grouped_matmul_forward"
    out = jax.ShapeDtypeStruct((m, n), x.dtype)
    return launch(name, kernel, out, scratch, most * tiles, [x, w, visits.table, visits.count])
