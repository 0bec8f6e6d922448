"""Chunks with one decay per channel of the key: what does not depend on the state, all in parallel (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, p pieces of bfloat16.

The scores sum_k q_ik k_jk exp(sum of g_k over j < l <= i) are made level by level: at size b = 1, 2, 4, ... 32 for rows
in the later half of 2 b tokens and columns in the earlier half, with the border between them for a reference. Then

    (q_i exp(sum of g from the border to i)) . (k_j exp(sum of g after j up to the border)),

no exponent is positive, whatever the decays, and nothing is divided by a vanishing product. The sums of g are products
of a 0/1 matrix with the three bfloat16 pieces of float32, hence exact. The rest is as in `gpu_prepare`.
"""

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
    each_row,
    indices,
    load,
    pieces,
    product,
    row_numbers,
    store,
    transposed,
    wide_block,
)
from hybridlm_kernels.linear_attention.gpu_prepare import BETA, INVERSE_PIECES, TOTAL, Chunks, at_level, inverse

GATE_PIECES = 3  # all of float32's digits
NUM_LEVELS = BLOCK.bit_length() - 1


def channel_gates(beta: Array | None, g: Array) -> Array:
    """[h n, TOTAL + k / c, c] float32: `gates` with factors of 1 for tokens; the chunks' decay channel by channel."""
    *_, t, key_dim = g.shape
    total = jnp.exp(g.astype(jnp.float32).reshape(-1, BLOCK, key_dim).sum(axis=1)).reshape(-1, key_dim // BLOCK, BLOCK)
    ones = jnp.ones((total.shape[0], TOTAL, BLOCK), jnp.float32)
    if beta is not None:
        ones = ones.at[:, BETA].set(beta.astype(jnp.float32).reshape(-1, BLOCK))
    return jnp.concatenate([ones, total], axis=1)


def up_to() -> Array:
    """[c, c] of 0 and 1: row i sums the tokens up to i."""
    row, column = indices()
    return jnp.where(row >= column, 1.0, 0.0)


def after() -> Array:
    """[c, c] of 0 and 1: row i sums the tokens after i."""
    row, column = indices()
    return jnp.where(row < column, 1.0, 0.0)


def to_border(size: Array) -> Array:
    """[c, c] of 0 and 1: row i sums the tokens between it and the border of its 2 `size` tokens' halves."""
    row, column = indices()
    is_same_half = (row & -size) == (column & -size)
    return jnp.where(is_same_half & jnp.where((row & size) == 0, row < column, row >= column), 1.0, 0.0)


def decays(matrix: Array, place: Operand, gate: Operand) -> Array:
    """exp of the sums of g [c, k block] that a matrix of 0 and 1 asks for; `place` is scratch."""
    store(place, matrix)
    plgpu.commit_smem()
    return jnp.exp(product(*((place, [piece]) for piece in gate)))


def prepare(q: Array, k: Array, g: Array, numbers: Array, *, scale: float, num_pieces: int, erases: bool) -> Chunks:
    """The chunks of q, k [heads, t, k] bfloat16, g [h, t, k] float32 and `channel_gates`."""
    (heads, t, key_dim), num_rows = g.shape, numbers.shape[1]
    num_chunks, key_blocks, group = t // BLOCK, key_dim // BLOCK, heads // q.shape[0]

    def kernel(q_ref: Ref, k_ref: Ref, g_ref: Ref, numbers_ref: Ref, *rest: Ref) -> None:
        q_out, k_out, leaving_out, *outs = rest[: 4 + erases]
        q_blocks, k_blocks, g_wide, scores, given, gate_blocks, scratch, ready = rest[4 + erases :]
        head, chunk = lax.axis_index("h"), lax.axis_index("n")
        index, tokens = head * num_chunks + chunk, pl.ds(chunk * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(numbers_ref.at[index], given, ready)
        for i in range(key_blocks):
            part = pl.ds(i * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(g_ref.at[head, tokens, part], g_wide.at[i], ready)
            for ref, buffer in ((q_ref, q_blocks), (k_ref, k_blocks)):
                plgpu.copy_gmem_to_smem(ref.at[lax.div(head, jnp.int32(group)), tokens, part], buffer.at[i], ready)
        plgpu.barrier_wait(ready)

        places = pieces(scratch, max(num_pieces, 2 * INVERSE_PIECES))
        gate, matrix = pieces(gate_blocks, GATE_PIECES), [places[-1]]
        q_scaled, k_scaled = places[:1], places[1 : 1 + INVERSE_PIECES]

        def send(operand: Operand, refs: list[Ref]) -> None:
            plgpu.commit_smem()
            for block, ref in zip(operand, refs, strict=True):
                plgpu.copy_smem_to_gmem(block, ref)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        only = lax.axis_index(ONLY)  # in the loops' counts, for what `repeat` has it
        zero = plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), jnp.float32), plgpu.Layout.WGMMA)
        scores[...] = zero

        def add_scores(value: Array) -> None:
            """In shared memory, since both they and the similarities would be too much for the registers."""
            scores[...] = plgpu.layout_cast(scores[...], plgpu.Layout.WGMMA) + value

        def of_channels(i: Array, similar: Array) -> Array:
            """Adds what 64 channels give the scores and similarities, and writes the chunk's queries and keys."""
            query, key = [q_blocks.at[i]], [k_blocks.at[i]]
            store(gate, plgpu.layout_cast(g_wide[i], plgpu.Layout.WGMMA))

            def level(_: Array, carries: tuple) -> tuple:
                similar, size = carries
                decay = decays(to_border(size), matrix, gate)
                store(q_scaled, load(query) * decay)
                store(k_scaled, load(key) * decay)
                plgpu.commit_smem()
                add_scores(at_level(product((q_scaled, transposed(k_scaled[:1]))), size))
                if erases:
                    similar = similar + at_level(product((k_scaled, transposed(k_scaled))), size)
                return similar, 2 * size

            similar, _ = lax.fori_loop(0, NUM_LEVELS - only, level, (similar, jnp.int32(1)))
            row, column = indices()
            add_scores(jnp.where(row == column, product((query, transposed(key))), 0.0))
            decay = decays(up_to(), matrix, gate)
            store(places[:1], load(query) * decay)
            store(places[1:2], load(key) * decay)
            store(places[2:3], load(key) * decays(after(), matrix, gate))
            part = pl.ds(i * BLOCK, BLOCK)
            send(places[:3], [ref.at[head, tokens, part] for ref in (q_out, k_out, leaving_out)])
            return similar

        similar = lax.fori_loop(0, key_blocks - only, of_channels, zero)

        def send_square(out: Ref, value: Array) -> None:
            store(places[:num_pieces], value)
            send(places[:num_pieces], [out.at[i * heads * num_chunks + index] for i in range(num_pieces)])

        send_square(outs[0], scale * plgpu.layout_cast(scores[...], plgpu.Layout.WGMMA))
        if erases:
            a = each_row(row_numbers(given.at[BETA])) * similar
            send_square(outs[1], inverse(a, places[:INVERSE_PIECES], places[INVERSE_PIECES : 2 * INVERSE_PIECES]))
        plgpu.wait_smem_to_gmem(0)

    arrays = (q, k, g, numbers)
    side = jax.ShapeDtypeStruct((heads, t, key_dim), jnp.bfloat16)
    square = jax.ShapeDtypeStruct((num_pieces * heads * num_chunks, BLOCK, BLOCK), jnp.bfloat16)
    q, k, leaving, *squares = gpu_kernel(
        kernel,
        out_type=[side] * 3 + [square] * (1 + erases),
        scratch_types=[
            blocks(key_blocks),
            blocks(key_blocks),
            wide_block(key_blocks),
            wide_block(),
            plgpu.SMEM((num_rows, BLOCK), jnp.float32),
            blocks(GATE_PIECES),
            blocks(max(num_pieces, 2 * INVERSE_PIECES)),
            plgpu.Barrier(num_arrivals=1 + 3 * key_blocks),
        ],
        grid=(1, heads, num_chunks),
        grid_names=(ONLY, "h", "n"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="linear_attention_channels_prepare",
    )(*arrays)
    return Chunks(q, k, leaving, numbers, squares[0], squares[1] if erases else None)
