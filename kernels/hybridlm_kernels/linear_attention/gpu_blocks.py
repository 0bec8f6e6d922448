"""Matrix products of 64 x 64 blocks on Hopper's tensor cores, for the linear attention kernels (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, v value dim, p pieces.

Every matrix is cut into 64 x 64 blocks of bfloat16 in shared memory, laid out as the tensor cores read them. A float32
matrix is held as p bfloat16 pieces that sum to it, the largest first: one piece is plain bfloat16, and products of two
pieces each are within 2^-16 of float32's.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

BLOCK = 64  # tokens of a chunk, and columns of a block: the tensor cores' 128-byte rows
PIECES = {"default": 1, "high": 2, "highest": 3}  # of what the kernels compute; their bfloat16 operands are exact
COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)

ONLY = "only"
Ref = Any  # a reference of Pallas, which has no public type for all kinds of them
Operand = Sequence[Ref]  # the pieces of one 64 x 64 block


def blocks(*count: int) -> Ref:
    """Shared memory for `count` bfloat16 blocks."""
    return plgpu.SMEM(
        (*count, BLOCK, BLOCK),
        jnp.bfloat16,
        transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
    )


def wide_block(*count: int) -> Ref:
    """Shared memory for `count` float32 blocks."""
    return plgpu.SMEM(
        (*count, BLOCK, BLOCK), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    )


def pieces(ref: Ref, count: int) -> list[Ref]:
    return [ref.at[i] for i in range(count)]


def transposed(operand: Operand) -> list[Ref]:
    return [ref.transpose((1, 0)) for ref in operand]


def store(operand: Operand, value: Array) -> None:
    """Writes a float32 block as pieces; `commit` before the tensor cores or the copy engine read them."""
    for i, ref in enumerate(operand):
        piece = value.astype(jnp.bfloat16)
        ref[...] = piece
        if i + 1 < len(operand):
            value = value - piece.astype(jnp.float32)


def load(operand: Operand) -> Array:
    """A float32 block from its pieces."""
    return sum_of(plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32) for ref in operand)


def sum_of(values: Iterable[Array]) -> Array:
    first, *rest = values
    for value in rest:
        first = first + value
    return first


def products(*sums: Sequence[tuple[Operand, Operand]]) -> list[Array]:
    """For every one of `sums` the float32 sum of its products a @ b of blocks, the small ones of pieces left out."""

    def run(*accumulators: Ref) -> list[Array]:
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                order = max(len(a), len(b))
                for i, j in itertools.product(range(len(a)), range(len(b))):
                    if i + j < order:
                        plgpu.wgmma(accumulator, a[i], b[j])
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *[plgpu.WGMMAAccumulatorRef((BLOCK, BLOCK), jnp.float32)] * len(sums))


def product(*pairs: tuple[Operand, Operand]) -> Array:
    return products(pairs)[0]


def row_numbers(ref: Ref) -> Array:
    """[c] float32 in shared memory, as one number for every row of a block."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1))


def each_row(numbers: Array) -> Array:
    """[c], one number for every row, spread over the columns of a block."""
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (BLOCK, BLOCK), (0,)), plgpu.Layout.WGMMA)


def column_numbers(ref: Ref) -> Array:
    """[c] float32 in shared memory, as one number for every column of a block."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(0))


def each_column(numbers: Array) -> Array:
    """[c], one number for every column, spread over the rows of a block."""
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, (BLOCK, BLOCK), (1,)), plgpu.Layout.WGMMA)


def indices() -> tuple[Array, Array]:
    """The row's and the column's number in every place of a block."""
    shape = (BLOCK, BLOCK)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))
    return row, column


def repeat(count: Array, body: Callable[[Array], None]) -> None:
    """`body(i)` for i = 0, 1, ..., `count` - 1.

    A `count` that only the running kernel knows also keeps registers free: of a loop that may not run at all, the
    compiler does not keep addresses and the like for what comes after it. Where there is but one, `count` is less by
    the index along `ONLY`, an axis of the grid of size 1.
    """
    lax.fori_loop(0, count, lambda i, _: body(i), None)


def stream(
    num_steps: int,
    stages: int,
    ready: Ref,
    fetch: Callable[[Array, Array], Sequence[tuple[Ref, Ref]]],
    body: Callable[[Array, Array, list[Array]], list[Array]],
    carries: list[Array],
) -> list[Array]:
    """`body(i, slot, carries)` for i = 0, 1, ..., `num_steps` - 1, the copies `fetch(i, slot)` done; the last carries.

    `fetch` names (in global memory, in shared memory) pairs; the copies of `stages` steps are in flight.
    """

    def start(i: Array, slot: Array) -> None:
        for source, buffer in fetch(i, slot):
            plgpu.copy_gmem_to_smem(source, buffer, ready.at[slot])

    def step(i: Array, carries: list[Array]) -> list[Array]:
        slot = lax.rem(i, jnp.int32(stages))
        plgpu.barrier_wait(ready.at[slot])
        carries = body(i, slot, carries)
        plgpu.commit_smem()  # from here on no thread reads this slot
        pl.when(i + stages < num_steps)(lambda: start(i + stages, slot))
        return carries

    for i in range(min(stages, num_steps)):
        start(jnp.int32(i), jnp.int32(i))
    return lax.fori_loop(0, num_steps, step, carries)
