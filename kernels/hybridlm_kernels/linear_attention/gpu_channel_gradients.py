"""Gradients of queries, keys and gates with one decay per channel, every chunk in parallel (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, v value dim, p pieces of bfloat16.

Queries and keys enter the chunk's products times exp(M g) in several ways, M a matrix of 0 and 1: summing the tokens up
to theirs (read of the state that enters), those after it (write to the state that leaves) and, for every level of the
scores, those up to the border of `gpu_channels`. Of each way, with x exp(M g) -> dx its gradient, q or k gains
exp(M g) dx, and g gains M^T (x exp(M g) dx): sums of terms, in which nothing has to cancel.

Two kernels: `of_scores` makes u and the gradients of the scores, `of_keys` walks through the ways for 64 channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.gpu_kernel import gpu_kernel
from hybridlm_kernels.linear_attention.gpu_blocks import (
    BLOCK,
    COMPILER_PARAMS,
    ONLY,
    Operand,
    Ref,
    blocks,
    column_numbers,
    each_column,
    each_row,
    indices,
    load,
    pieces,
    product,
    repeat,
    row_numbers,
    store,
    transposed,
    wide_block,
)
from hybridlm_kernels.linear_attention.gpu_channels import (
    GATE_PIECES,
    NUM_LEVELS,
    after,
    decays,
    to_border,
    up_to,
)
from hybridlm_kernels.linear_attention.gpu_prepare import BETA, TOTAL, Chunks, at_level

SLOPE_PIECES = 2  # of what g gains
D_QUERY, D_KEY, D_LEAVING, D_GATE = range(4)  # what `of_keys` adds up


def gradients(
    chunks: Chunks,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    states: Array,
    do: Array,
    dr: Array,
    dstates: Array,
    *,
    scale: float,
    num_pieces: int,
) -> tuple[Array, Array, Array, Array]:
    """dq, dk [h, t, k] bfloat16, of every value head, dg [h, t, k] and dbeta [h n, c] float32.

    q, k [heads, t, k]; v, do [h, t, v]; g [h, t, k]; dr [p, h, t, v]; `states` and `dstates` [p h n, k, v].
    """
    options = {"scale": scale, "num_pieces": num_pieces}
    dr, g = dr.reshape(-1, *v.shape[1:]), g.astype(jnp.float32)
    u, d_scores, d_similar, from_r = of_scores(chunks, v, do, dr, states, **options)
    dq, dk, dg, dbeta = of_keys(q, k, g, chunks.numbers, u, do, dr, states, dstates, d_scores, d_similar, **options)
    return dq, dk, dg, dbeta.sum(axis=1) if from_r is None else dbeta.sum(axis=1) + from_r


def of_scores(
    chunks: Chunks, v: Array, do: Array, dr: Array, states: Array, *, scale: float, num_pieces: int
) -> tuple[Array, Array, Array | None, Array | None]:
    """u [p h, t, v]; of the scores and, where it erases, of the similarities of keys the gradients [p h n, c, c]; and
    [h n, c] float32 of dbeta what r gives. v, do [h, t, v], dr [p h, t, v], states [p h n, k, v].
    """
    (heads, t, value_dim), key_dim = v.shape, chunks.k.shape[2]
    num_chunks, key_blocks, value_blocks = t // BLOCK, key_dim // BLOCK, value_dim // BLOCK
    erases = chunks.inverse is not None
    arrays = [v, do]
    if chunks.inverse is not None:
        arrays += [dr, chunks.numbers, chunks.k, states, chunks.inverse]

    def kernel(*refs: Ref) -> None:
        v_ref, do_ref, *erasing = refs[: len(arrays)]
        outs, (v_all, do_all, scratch, ready) = refs[len(arrays) :][: 1 + 3 * erases], refs[-4 - 5 * erases :][:4]
        head, chunk = lax.axis_index("h"), lax.axis_index("n")
        index, tokens = head * num_chunks + chunk, pl.ds(chunk * BLOCK, BLOCK)
        part = [pl.ds(i * BLOCK, BLOCK) for i in range(max(key_blocks, value_blocks))]
        every, places = range(num_pieces), pieces(scratch, num_pieces)
        squares = [i * heads * num_chunks + index for i in every]
        copies = [(v_ref.at[head, tokens, part[j]], v_all.at[j, 0]) for j in range(value_blocks)]
        copies += [(do_ref.at[head, tokens, part[j]], do_all.at[j]) for j in range(value_blocks)]
        u = [pieces(v_all.at[j], num_pieces if erases else 1) for j in range(value_blocks)]
        of_erasing: list[Any] = list(refs[-5:]) if erases else [None] * 5
        dr_all, given, k_all, s_all, inverse_all = of_erasing
        dr_of = [pieces(dr_all.at[j], num_pieces) for j in range(value_blocks)] if erases else []
        if erases:
            dr_ref, numbers_ref, k_ref, states_ref, inverse_ref = erasing
            copies.append((numbers_ref.at[index], given))
            copies += [(k_ref.at[head, tokens, part[i]], k_all.at[i]) for i in range(key_blocks)]
            for p, square in enumerate(squares):
                copies.append((inverse_ref.at[square], inverse_all.at[p]))
                for j in range(value_blocks):
                    copies.append((dr_ref.at[p * heads + head, tokens, part[j]], dr_of[j][p]))
                    for i in range(key_blocks):
                        copies.append((states_ref.at[square, part[i], part[j]], s_all.at[i, j, p]))
        for source, buffer in copies:
            plgpu.copy_gmem_to_smem(source, buffer, ready)
        plgpu.barrier_wait(ready)

        def send(out: Ref, value: Array) -> None:
            store(places, value)
            plgpu.commit_smem()
            for square, place in zip(squares, places, strict=True):
                plgpu.copy_smem_to_gmem(place, out.at[square])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if erases:
            beta = row_numbers(given.at[BETA])
            d_beta = plgpu.layout_cast(jnp.zeros(BLOCK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
            for j in range(value_blocks):
                read = [([k_all.at[i]], pieces(s_all.at[i, j], num_pieces)) for i in range(key_blocks)]
                r = load([v_all.at[j, 0]]) - product(*read)
                d_beta = d_beta + (load(dr_of[j]) * r).sum(axis=1)
                store(u[j], each_row(beta) * r)
                plgpu.commit_smem()
                store(u[j], product((pieces(inverse_all, num_pieces), u[j])))
                plgpu.commit_smem()
                for p in every:
                    plgpu.copy_smem_to_gmem(u[j][p], outs[1].at[p * heads + head, tokens, part[j]])
            given[BETA] = d_beta
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(given.at[BETA], outs[3].at[index])
        row, column = indices()
        slope = product(*(([do_all.at[j]], transposed(u[j])) for j in range(value_blocks)))
        send(outs[0], jnp.where(row >= column, scale * slope, 0.0))
        if erases:
            slope = product(*((dr_of[j], transposed(u[j])) for j in range(value_blocks)))
            send(outs[2], jnp.where(row > column, -slope, 0.0))
        plgpu.wait_smem_to_gmem(0)

    square = jax.ShapeDtypeStruct((num_pieces * heads * num_chunks, BLOCK, BLOCK), jnp.bfloat16)
    u = jax.ShapeDtypeStruct((num_pieces * heads, t, value_dim), jnp.bfloat16)
    sums = jax.ShapeDtypeStruct((heads * num_chunks, BLOCK), jnp.float32)
    num_copies = 2 * value_blocks
    if erases:
        num_copies += 1 + key_blocks + num_pieces * (1 + value_blocks * (1 + key_blocks))
    results = gpu_kernel(
        kernel,
        out_type=[square, u, square, sums] if erases else [square],
        scratch_types=[
            blocks(value_blocks, num_pieces),
            blocks(value_blocks),
            blocks(num_pieces),
            plgpu.Barrier(num_arrivals=num_copies),
            *(
                (
                    blocks(value_blocks, num_pieces),
                    plgpu.SMEM((chunks.numbers.shape[1], BLOCK), jnp.float32),
                    blocks(key_blocks),
                    blocks(key_blocks, value_blocks, num_pieces),
                    blocks(num_pieces),
                )
                if erases
                else ()
            ),
        ],
        grid=(heads, num_chunks),
        grid_names=("h", "n"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="linear_attention_channels_scores",
    )(*arrays)
    return (results[1], results[0], results[2], results[3]) if erases else (v, results[0], None, None)


def of_keys(
    q: Array,
    k: Array,
    g: Array,
    numbers: Array,
    u: Array,
    do: Array,
    dr: Array,
    states: Array,
    dstates: Array,
    d_scores: Array,
    d_similar: Array | None,
    *,
    scale: float,
    num_pieces: int,
) -> tuple[Array, Array, Array, Array]:
    """dq, dk [h, t, k] bfloat16, dg [h, t, k] float32 and what similarities give dbeta, [h n, k / c, c] float32.

    q, k [heads, t, k]; g [h, t, k]; u, dr [p h, t, v] (u of one piece where nothing is erased), do [h, t, v]; states,
    dstates [p h n, k, v]; the rest as `of_scores` makes it.
    """
    (heads, t, value_dim), key_dim = do.shape, q.shape[2]
    num_chunks, key_blocks, value_blocks = t // BLOCK, key_dim // BLOCK, value_dim // BLOCK
    group, erases = heads // q.shape[0], d_similar is not None
    u_pieces = num_pieces if erases else 1
    arrays = [q, k, g, numbers, u, do, states, dstates, d_scores]
    if d_similar is not None:
        arrays += [dr, d_similar]

    def kernel(*refs: Ref) -> None:
        q_ref, k_ref, g_ref, numbers_ref, u_ref, do_ref, states_ref, dstates_ref, scores_ref, *erasing = refs[
            : len(arrays)
        ]
        dq_ref, dk_ref, dg_ref, sums_ref = refs[len(arrays) : len(arrays) + 4]
        qk, totals, given, row_sums, gate_all, slopes, level_all, values, ready, ready_values = refs[len(arrays) + 4 :]
        index, block = lax.axis_index("hn"), lax.axis_index("k")
        head, chunk = lax.div(index, jnp.int32(num_chunks)), lax.rem(index, jnp.int32(num_chunks))
        tokens = pl.ds(chunk * BLOCK, BLOCK)
        key_head, channels = lax.div(head, jnp.int32(group)), pl.ds(block * BLOCK, BLOCK)
        squares = [i * heads * num_chunks + index for i in range(num_pieces)]
        copies = [(numbers_ref.at[index], given), (g_ref.at[head, tokens, channels], totals.at[D_GATE])]
        copies += [(ref.at[key_head, tokens, channels], qk.at[i]) for i, ref in enumerate((q_ref, k_ref))]
        for i, ref in enumerate((scores_ref, *erasing[1:])):
            copies += [(ref.at[square], slopes.at[i, p]) for p, square in enumerate(squares)]
        for source, buffer in copies:
            plgpu.copy_gmem_to_smem(source, buffer, ready)

        def fetch(j: Array) -> list[Operand]:
            """u, do, S, dS and dr of 64 columns of the values."""
            part = pl.ds(j * BLOCK, BLOCK)
            sources = [[u_ref.at[p * heads + head, tokens, part] for p in range(u_pieces)]]
            sources.append([do_ref.at[head, tokens, part]])
            sources += [[ref.at[square, channels, part] for square in squares] for ref in (states_ref, dstates_ref)]
            sources += [[ref.at[p * heads + head, tokens, part] for p in range(num_pieces)] for ref in erasing[:1]]
            for i, source in enumerate(sources):
                for p, piece in enumerate(source):
                    plgpu.copy_gmem_to_smem(piece, values.at[i, p], ready_values)
            plgpu.barrier_wait(ready_values)
            return [pieces(values.at[i], len(source)) for i, source in enumerate(sources)]

        query, key, gate = [qk.at[0]], [qk.at[1]], pieces(gate_all, GATE_PIECES)
        places = pieces(level_all, 4)
        matrix, slope = places[:1], places[1 : 1 + SLOPE_PIECES]

        # In shared memory: three blocks of float32 are too many registers for all that is done in between.
        def total(i: int) -> Array:
            return plgpu.layout_cast(totals[i], plgpu.Layout.WGMMA)

        def add(i: int, value: Array) -> None:
            totals[i] = total(i) + value

        def add_row(value: Array) -> None:
            row_sums[...] = row_numbers(row_sums) + value

        def beta() -> Array:
            return each_row(row_numbers(given.at[BETA]))

        def gain(value: Array) -> None:
            """Adds what g gains of the gradient of the sums that are in `matrix`."""
            store(slope, value)
            plgpu.commit_smem()
            add(D_GATE, product((transposed(matrix), slope)))

        def of_values(j: Array) -> None:
            u_of, do_of, entering, leaving, *dr_of = fetch(j)
            add(D_QUERY, product((do_of, transposed(entering))))
            add(D_LEAVING, product((u_of, transposed(leaving))))
            if erases:
                add(D_KEY, -product((dr_of[0], transposed(entering))))
            add_row((load(entering) * load(leaving)).sum(axis=1))
            plgpu.commit_smem()

        def of_states(_: Array) -> None:
            totals[D_GATE] = each_column(column_numbers(given.at[TOTAL + block]) * column_numbers(row_sums))
            decay = decays(up_to(), matrix, gate)
            totals[D_QUERY] = scale * decay * total(D_QUERY)
            totals[D_KEY] = beta() * decay * total(D_KEY)
            gain(load(query) * total(D_QUERY) + load(key) * total(D_KEY))
            from_leaving = decays(after(), matrix, gate) * total(D_LEAVING)
            add(D_KEY, from_leaving)
            gain(load(key) * from_leaving)

        def of_diagonal(_: Array) -> None:
            row, column = indices()
            slope_of_itself = jnp.where(row == column, load(pieces(slopes.at[0], num_pieces)), 0.0).sum(axis=1)
            add(D_QUERY, each_row(slope_of_itself) * load(key))
            add(D_KEY, each_row(slope_of_itself) * load(query))

        def of_level(i: Array) -> None:
            size = jnp.left_shift(jnp.int32(1), i)
            decay = decays(to_border(size), matrix, gate)
            q_scaled, k_scaled, d_level = places[1:2], places[2:3], places[3:4]
            store(q_scaled, load(query) * decay)
            store(k_scaled, load(key) * decay)
            store(d_level, at_level(load(pieces(slopes.at[0], num_pieces)), size))
            plgpu.commit_smem()
            more_q = decay * product((d_level, k_scaled))
            add(D_QUERY, more_q)
            slopes_of_g = load(query) * more_q
            more_k = product((transposed(d_level), q_scaled))
            if erases:
                store(d_level, at_level(load(pieces(slopes.at[1], num_pieces)), size))
                store(q_scaled, beta() * decay * load(key))
                plgpu.commit_smem()
                back = product((d_level, k_scaled))
                add_row((decay * load(key) * back).sum(axis=1))
                more_k = more_k + beta() * back + product((transposed(d_level), q_scaled))
            more_k = decay * more_k
            add(D_KEY, more_k)
            gain(slopes_of_g + load(key) * more_k)

        nothing = plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
        no_rows = plgpu.layout_cast(jnp.zeros(BLOCK, jnp.float32), plgpu.Layout.WGMMA.reduce(1))
        only = lax.axis_index(ONLY)
        plgpu.barrier_wait(ready)
        store(gate, total(D_GATE))  # where g was copied to
        for i in (D_QUERY, D_KEY, D_LEAVING):
            totals[i] = nothing
        row_sums[...] = no_rows
        repeat(value_blocks - only, of_values)
        repeat(1 - only, of_states)
        row_sums[...] = no_rows
        repeat(1 - only, of_diagonal)
        repeat(NUM_LEVELS - only, of_level)
        store(places[:1], total(D_QUERY))
        store(places[1:2], total(D_KEY))
        plgpu.commit_smem()
        for source, ref in ((places[0], dq_ref), (places[1], dk_ref), (totals.at[D_GATE], dg_ref)):
            plgpu.copy_smem_to_gmem(source, ref.at[head, tokens, channels])
        plgpu.copy_smem_to_gmem(row_sums, sums_ref.at[index, block])
        plgpu.wait_smem_to_gmem(0)

    side = jax.ShapeDtypeStruct((heads, t, key_dim), jnp.bfloat16)
    of_values = u_pieces + 1 + 2 * num_pieces + erases * num_pieces
    dq, dk, dg, sums = gpu_kernel(
        kernel,
        out_type=[
            side,
            side,
            jax.ShapeDtypeStruct(side.shape, jnp.float32),
            jax.ShapeDtypeStruct((heads * num_chunks, key_blocks, BLOCK), jnp.float32),
        ],
        scratch_types=[
            blocks(2),
            wide_block(4),
            plgpu.SMEM((numbers.shape[1], BLOCK), jnp.float32),
            plgpu.SMEM((BLOCK,), jnp.float32),
            blocks(GATE_PIECES),
            blocks(1 + erases, num_pieces),
            blocks(4),
            blocks(4 + erases, num_pieces),
            plgpu.Barrier(num_arrivals=4 + (1 + erases) * num_pieces),
            plgpu.Barrier(num_arrivals=of_values),
        ],
        grid=(1, key_blocks, heads * num_chunks),
        grid_names=(ONLY, "k", "hn"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="linear_attention_channels_keys",
    )(*arrays)
    return dq, dk, dg, sums


def shared_bytes(key_dim: int, value_dim: int, num_pieces: int, *, erases: bool) -> int:
    """What the kernel that needs the most takes of a multiprocessor's shared memory."""
    key_blocks, value_blocks = key_dim // BLOCK, value_dim // BLOCK
    scores = 2 * value_blocks + num_pieces * (1 + erases * (1 + value_blocks + key_blocks * value_blocks)) + key_blocks
    keys = 2 + 2 * 4 + GATE_PIECES + 4 + num_pieces * (5 + 2 * erases)
    walk = (2 if key_dim * num_pieces <= 128 else 1) * (3 * key_blocks + 1 + 2 * num_pieces)
    walk += num_pieces * (key_blocks + 3)
    return max(scores, keys, walk) * BLOCK * BLOCK * 2 + 8 * 1024  # the rest: numbers per token, barriers and such
