"""Gradients of grouped matrices on Hopper GPUs: dw[g] = x^T dy over the rows of group g, rounded once.

Letters: m rows, g groups, k inputs, n outputs.

A tile is 128 inputs by up to 256 outputs of one group, which is summed over the group's rows, 64 at a time, from a
multiple of 8 on. The first step and the last may hold rows of other groups, or of none: these are set to zero in shared
memory, in both operands, for what they hold need not be finite.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.grouped_matmul.gpu_stages import (
    BLOCK,
    CONSUMERS,
    STAGES,
    SWIZZLED,
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

INPUTS = CONSUMERS * BLOCK  # of a tile
PIECES = 4  # of the width of swizzled rows, that a warpgroup sends at a time


def gradients(x: Array, dy: Array, group_sizes: Array, dtype: Any) -> Array:
    """dw [g, k, n] in `dtype`, of 16 or 32 bits; x [m, k] and dy [m, n] of one dtype, m a multiple of 8."""
    (m, k), n, num_groups = x.shape, dy.shape[1], group_sizes.shape[0]
    input_tiles = pl.cdiv(k, INPUTS)
    width = tile_width(n, num_groups * input_tiles)
    output_tiles = pl.cdiv(n, width)
    piece_width = SWIZZLED // jnp.dtype(dtype).itemsize
    num_items = num_groups * input_tiles * output_tiles

    def kernel(
        x_ref: Ref,
        dy_ref: Ref,
        span_ref: Ref,
        dw_ref: Ref,
        x_blocks: Ref,
        dy_blocks: Ref,
        sent: Ref,
        full: Ref,
        empty: Ref,
    ) -> None:
        ring = Ring(full, empty)

        def place(item: Array) -> tuple[Array, Array, Array]:
            """The group, and where the tile begins among the inputs and the outputs."""
            rest, output_tile = lax.div(item, jnp.int32(output_tiles)), lax.rem(item, jnp.int32(output_tiles))
            group, input_tile = lax.div(rest, jnp.int32(input_tiles)), lax.rem(rest, jnp.int32(input_tiles))
            return group, input_tile * INPUTS, output_tile * width

        def rows_of(group: Array) -> tuple[Array, Array, Array, Array]:
            """The row where copies begin, the group's first row and the first past it from there, and the steps."""
            begin, first, end = (span_ref[j, group] for j in range(3))
            return begin, first, end, jnp.where(end > first, lax.div(end + BLOCK - 1, jnp.int32(BLOCK)), 0)

        def fetch(item: Array, step: Array) -> Array:
            group, first_input, first_output = place(item)
            begin, _, _, steps = rows_of(group)

            def copies(i: Array, slot: Array) -> list[tuple[Ref, Ref]]:
                rows = pl.ds(begin + i * BLOCK, BLOCK)
                halves = [pl.ds(first_input + j * BLOCK, BLOCK) for j in range(CONSUMERS)]
                x_copies = [(x_ref.at[rows, half], x_blocks.at[slot, j]) for j, half in enumerate(halves)]
                return [*x_copies, (dy_ref.at[rows, pl.ds(first_output, width)], dy_blocks.at[slot])]

            return ring.fetch(step, steps, copies)

        def compute(warpgroup: Array, item: Array, step: Array) -> Array:
            group, first_input, first_output = place(item)
            _, first, end, steps = rows_of(group)

            def products(total: Ref, i: Array, slot: Array) -> None:
                low, high = first - i * BLOCK, end - i * BLOCK
                pl.when((low > 0) | (high < BLOCK))(lambda: clear(warpgroup, slot, low, high))
                plgpu.wgmma(total, x_blocks.at[slot, warpgroup].transpose((1, 0)), dy_blocks.at[slot])

            dw = ring.multiply(step, steps, (BLOCK, width), products)
            half = first_input + warpgroup * BLOCK
            pl.when(half < k)(lambda: send(warpgroup, dw, group, half, first_output))
            return step + steps

        def clear(warpgroup: Array, slot: Array, low: Array, high: Array) -> None:
            """Zero but from row `low` to `high`. Both warpgroups clear dy, to the same, so that neither need wait."""
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), 0, layout=plgpu.Layout.WGMMA)
            own = (low <= row) & (row < high)
            wide = [dy_blocks.at[slot, :, j * BLOCK : (j + 1) * BLOCK] for j in range(width // BLOCK)]
            for block in [x_blocks.at[slot, warpgroup], *wide]:
                value = plgpu.layout_cast(block[...], plgpu.Layout.WGMMA)
                block[...] = jnp.where(own, value, jnp.zeros((), value.dtype))
            plgpu.commit_smem()

        def send(warpgroup: Array, dw: Array, group: Array, first_input: Array, first_output: Array) -> None:
            rounded, at_a_time = dw.astype(dtype), PIECES * piece_width
            for start in range(0, width, at_a_time):
                pieces = range(start, min(start + at_a_time, width), piece_width)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, piece in enumerate(pieces):
                    sent[warpgroup, i] = rounded[:, piece : piece + piece_width]
                plgpu.commit_smem()
                for i, piece in enumerate(pieces):
                    column = first_output + piece
                    target = dw_ref.at[group, pl.ds(first_input, BLOCK), pl.ds(column, piece_width)]
                    copy = functools.partial(plgpu.copy_smem_to_gmem, sent.at[warpgroup, i], target)
                    pl.when(column < n)(copy)

        work(
            ring,
            lambda: each_item(jnp.int32(num_items), fetch),
            lambda warpgroup: each_item(jnp.int32(num_items), lambda item, step: compute(warpgroup, item, step)),
        )

    scratch = [
        operands(STAGES, CONSUMERS, BLOCK, BLOCK, dtype=x.dtype),
        operands(STAGES, BLOCK, width, dtype=x.dtype),
        outputs(CONSUMERS, PIECES, BLOCK, piece_width, dtype=dtype),
        *barriers(copies=CONSUMERS + 1),
    ]
    out = jax.ShapeDtypeStruct((num_groups, k, n), dtype)
    arrays = [x, dy, jnp.stack(spans(group_sizes, m))]
    return launch("grouped_matmul_weights", kernel, out, scratch, num_items, arrays)
