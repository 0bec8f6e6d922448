"""The state of gated linear attention and of the gated delta rule walking over chunks (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, v value dim, p pieces of bfloat16.

One warpgroup owns one head and 64 columns of the values; k x 64 numbers of its state stay in registers all the time.
With S the state that enters a chunk, and pre, suf the sums of g up to a token and after it:

    u = T r,  r = beta (v - exp(pre) (k S))      or u = v where nothing is erased
    o = scale exp(pre) (q S) + P u,              S' = exp(total) S + k^T (exp(suf) u)

and back in time, dS the gradient of the state that leaves the chunk:

    dr = T^T (P^T do + exp(suf) (k dS))          or without T^T
    dS' = exp(total) dS + q^T (scale exp(pre) do) - k^T (beta exp(pre) dr)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel
from hybridlm_kernels.linear_attention.gpu_blocks import (
    BLOCK,
    COMPILER_PARAMS,
    Operand,
    Ref,
    blocks,
    each_row,
    load,
    pieces,
    product,
    products,
    row_numbers,
    store,
    stream,
    transposed,
    wide_block,
)
from hybridlm_kernels.linear_attention.gpu_prepare import BETA, ENTER, LEAVE, TOTAL, Chunks


def forward(
    chunks: Chunks,
    v: Array,
    s0: Array,
    *,
    scale: float,
    num_pieces: int,
    save: bool,
) -> tuple[Array, Array, Array | None]:
    """o [h, t, v], the last state [h, k, v] float32 and, to `save`, the states before the chunks [p, h n, k, v].

    v [h, t, v]; s0 [h, k, v] float32.
    """

    def step(tile: Tile, states: list[Array]) -> list[Array]:
        values = [tile.values]
        read = [list(zip(operands, tile.state, strict=True)) for operands in (tile.queries, tile.keys)]
        beta, enter, leave = tile.factors()
        if chunks.inverse is None:
            (read_q,) = products(read[0])
            u_operand, u = values, load(values)
        else:
            read_q, read_k = products(*read)
            store(tile.scratch[0], beta * load(values) - beta * enter * read_k)
            plgpu.commit_smem()
            u_operand, u = tile.scratch[0], product((tile.inverse, tile.scratch[0]))
            store(u_operand, u)
        store(tile.scratch[1], leave * u)
        plgpu.commit_smem()
        o = scale * enter * read_q + product((tile.scores, u_operand))
        store(tile.scratch[0][:1], o)
        tile.send(tile.scratch[0][:1])
        added = products(*[[(transposed(key), tile.scratch[1])] for key in tile.leaving])
        return [decay * state + more for decay, state, more in zip(tile.totals(), states, added, strict=True)]

    return walk("linear_attention_forward", step, chunks, v, s0, num_pieces, 1, 2, save, reverse=False)


def backward(
    chunks: Chunks,
    do: Array,
    ds_last: Array,
    *,
    scale: float,
    num_pieces: int,
) -> tuple[Array, Array, Array]:
    """dr [p, h, t, v] bfloat16, ds0 [h, k, v] float32, and the gradients of the states after the chunks [p, h n, k, v].

    dr is the gradient of r, or of v where nothing is erased.
    """

    def step(tile: Tile, states: list[Array]) -> list[Array]:
        queries, keys, given = tile.queries, tile.keys, [tile.values]
        beta, enter, leave = tile.factors()
        through_scores, through_state = products(
            [(transposed(tile.scores), given)], [(key, s) for key, s in zip(tile.leaving, tile.state, strict=True)]
        )
        dr = through_scores + leave * through_state
        store(tile.scratch[0], dr)
        store(tile.scratch[1], scale * enter * load(given))
        plgpu.commit_smem()
        if chunks.inverse is not None:
            dr = product((transposed(tile.inverse), tile.scratch[0]))
            store(tile.scratch[0], dr)
            store(tile.scratch[2], -beta * enter * dr)
            plgpu.commit_smem()
        tile.send(tile.scratch[0])
        pairs = [[(transposed(query), tile.scratch[1])] for query in queries]
        if chunks.inverse is not None:
            pairs = [[*pair, (transposed(key), tile.scratch[2])] for pair, key in zip(pairs, keys, strict=True)]
        added = products(*pairs)
        return [decay * state + more for decay, state, more in zip(tile.totals(), states, added, strict=True)]

    dr, ds0, dstates = walk(
        "linear_attention_backward",
        step,
        chunks,
        do,
        ds_last,
        num_pieces,
        num_pieces,
        3,
        save=True,
        reverse=True,
    )
    assert dstates is not None
    return dr, ds0, dstates


@dataclasses.dataclass(frozen=True)
class Tile:
    """One chunk of one head and 64 value columns, in shared memory."""

    queries: Sequence[Operand]  # one a block of the key dim, as are the next three
    keys: Sequence[Operand]
    leaving: Sequence[Operand]
    state: Sequence[Operand]  # what is carried, before the step
    totals: Callable[[], Sequence[Array]]  # what the chunk decays it by
    values: Ref
    scores: Operand
    inverse: Operand
    factors: Callable[[], tuple[Array, Array | float, Array | float]]  # of tokens: beta, exp(pre), exp(suf)
    scratch: Sequence[Operand]
    send: Callable[[Operand], None]  # writes the chunk's output, to be in `scratch` still at the end of the chunk


def walk(
    name: str,
    step: Callable[[Tile, list[Array]], list[Array]],
    given: Chunks,
    values: Array,
    state: Array,
    num_pieces: int,
    num_outs: int,
    num_scratch: int,
    save: bool,
    *,
    reverse: bool,
) -> tuple[Array, Array, Array | None]:
    """Carries `state` [h, k, v] over the chunks by `step`; the outputs [num_outs, h, t, v] that it sent, the last state
    and, to `save`, every chunk's before its step [p, h n, k, v].
    """
    (heads, t, value_dim), key_dim = values.shape, given.k.shape[2]
    num_chunks, key_blocks, group = t // BLOCK, key_dim // BLOCK, heads // given.k.shape[0]
    squares = [given.scores] if given.inverse is None else [given.scores, given.inverse]
    sides = [given.q, given.k] if given.leaving is None else [given.q, given.k, given.leaving]
    num_rows = given.numbers.shape[1]
    stages = 2 if key_dim * num_pieces <= 128 else 1  # of 227 KiB shared memory

    def kernel(*refs: Ref) -> None:
        rest = iter(refs)
        side_refs, square_refs = ([next(rest) for _ in arrays] for arrays in (sides, squares))
        values_ref, numbers_ref, state_ref, out_ref, last_ref = (next(rest) for _ in range(5))
        *states_ref, ready, whole = rest
        head, columns = lax.axis_index("h"), pl.ds(lax.axis_index("v") * BLOCK, BLOCK)
        key_head = lax.div(head, jnp.int32(group))
        key_columns = [pl.ds(i * BLOCK, BLOCK) for i in range(key_blocks)]

        def chunk_of(i: Array) -> Array:
            return num_chunks - 1 - i if reverse else i

        def over_chunks(
            states: list[Array],
            side_blocks: Ref,
            value_blocks: Ref,
            numbers: Ref,
            square_blocks: Ref,
            s_blocks: Ref,
            scratch: Ref,
        ) -> list[Array]:
            def fetch(i: Array, slot: Array) -> list[tuple[Ref, Ref]]:
                index = head * num_chunks + chunk_of(i)
                tokens = pl.ds(chunk_of(i) * BLOCK, BLOCK)
                copies = [(values_ref.at[head, tokens, columns], value_blocks.at[slot])]
                copies.append((numbers_ref.at[index], numbers.at[slot]))
                for side, ref in enumerate(side_refs):
                    for j, part in enumerate(key_columns):
                        copies.append((ref.at[key_head, tokens, part], side_blocks.at[slot, side, j]))
                for j, ref in enumerate(square_refs):
                    for p in range(num_pieces):
                        copies.append((ref.at[p * heads * num_chunks + index], square_blocks.at[slot, j, p]))
                return copies

            def body(i: Array, slot: Array, states: list[Array]) -> list[Array]:
                index = head * num_chunks + chunk_of(i)
                tokens = pl.ds(chunk_of(i) * BLOCK, BLOCK)
                state = [pieces(s_blocks.at[j], num_pieces) for j in range(key_blocks)]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for operand, value in zip(state, states, strict=True):
                    store(operand, value)
                plgpu.commit_smem()
                for ref in states_ref:
                    for part, operand in zip(key_columns, state, strict=True):
                        for p, piece in enumerate(operand):
                            plgpu.copy_smem_to_gmem(piece, ref.at[p * heads * num_chunks + index, part, columns])

                def send(operand: Operand) -> None:
                    plgpu.commit_smem()
                    for p, piece in enumerate(operand):
                        plgpu.copy_smem_to_gmem(piece, out_ref.at[p * heads + head, tokens, columns])

                def row(number: int) -> Array:
                    return row_numbers(numbers.at[slot, number])

                def factor(number: int) -> Array | float:
                    return each_row(row(number)) if given.leaving is None else 1.0

                operands = [[[side_blocks.at[slot, i, j]] for j in range(key_blocks)] for i in range(len(sides))]
                tile = Tile(
                    queries=operands[0],
                    keys=operands[1],
                    leaving=operands[-1],
                    state=state,
                    totals=lambda: [each_row(row(min(TOTAL + j, num_rows - 1))) for j in range(key_blocks)],
                    values=value_blocks.at[slot],
                    scores=pieces(square_blocks.at[slot, 0], num_pieces),
                    inverse=pieces(square_blocks.at[slot, len(squares) - 1], num_pieces),
                    factors=lambda: (each_row(row(BETA)), factor(ENTER), factor(LEAVE)),
                    scratch=[pieces(scratch.at[j], num_pieces) for j in range(num_scratch)],
                    send=send,
                )
                return step(tile, states)

            states = stream(num_chunks, stages, ready, fetch, body, states)
            plgpu.wait_smem_to_gmem(0)
            return states

        def first(block: Ref) -> list[Array]:
            states = []
            for part in key_columns:
                plgpu.copy_gmem_to_smem(state_ref.at[head, part, columns], block, whole)
                plgpu.barrier_wait(whole)
                states.append(plgpu.layout_cast(block[...], plgpu.Layout.WGMMA))
                plgpu.commit_smem()
            return states

        def last(block: Ref) -> None:
            for part, value in zip(key_columns, states, strict=True):
                block[...] = value
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(block, last_ref.at[head, part, columns])
                plgpu.wait_smem_to_gmem(0)

        states = pl.run_scoped(first, wide_block())
        states = pl.run_scoped(
            functools.partial(over_chunks, states),
            blocks(stages, len(sides), key_blocks),
            blocks(stages),
            plgpu.SMEM((stages, num_rows, BLOCK), jnp.float32),
            blocks(stages, len(squares), num_pieces),
            blocks(key_blocks, num_pieces),
            blocks(num_scratch, num_pieces),
        )
        pl.run_scoped(last, wide_block())

    arrays = (*sides, *squares, values, given.numbers, state)
    outs = [
        jax.ShapeDtypeStruct((num_outs * heads, t, value_dim), jnp.bfloat16),
        jax.ShapeDtypeStruct((heads, key_dim, value_dim), jnp.float32),
    ]
    if save:
        outs.append(jax.ShapeDtypeStruct((num_pieces * heads * num_chunks, key_dim, value_dim), jnp.bfloat16))
    fetched = 2 + len(sides) * key_blocks + len(squares) * num_pieces
    results = gpu_kernel(
        kernel,
        out_type=outs,
        scratch_types=[
            plgpu.Barrier(num_arrivals=fetched, num_barriers=stages),
            plgpu.Barrier(),
        ],
        grid=(heads, value_dim // BLOCK),
        grid_names=("h", "v"),
        compiler_params=COMPILER_PARAMS,
        kernel_name=name,
    )(*arrays)
    out = results[0].reshape(num_outs, heads, t, value_dim)
    return out, results[1], results[2] if save else None
