"""What of a chunk of gated linear attention does not depend on the state, every chunk in parallel (Mosaic GPU).

Letters: h value heads of all batch rows, n chunks, c chunk (64 tokens), k key dim, p pieces of bfloat16.

    scores  = scale (q k^T) o Gamma on and below the diagonal,      Gamma_ij = exp(sum of g over j < l <= i)
    inverse = (I + A)^-1,  A = beta_i (k k^T) o Gamma below it      (Yang et al., 2024, arXiv:2412.06464, section 3.3)

The sums of g are differences of prefix sums that are kept to 48 bits, as pairs of float32, so that a document's reset
(a huge negative g) costs no digit of the sums beside it. The inverse grows by block doubling: with X the inverse of the
diagonal blocks of size b and L what joins two of them, X - X L X is that of size 2 b. It never forms powers of A, and
its products are of two pieces, whatever the precision.
"""

import dataclasses

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
    column_numbers,
    each_column,
    each_row,
    indices,
    pieces,
    product,
    row_numbers,
    store,
    transposed,
)

INVERSE_PIECES = 2
# Rows of `gates`: the prefix sums of g as pairs, beta, and exp of the sums of g up to, after and of all tokens.
PREFIX, REST, BETA, ENTER, LEAVE, TOTAL, NUM_ROWS = range(7)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """What the walk over chunks takes of queries, keys and gates."""

    q: Array  # [heads, t, k]
    k: Array
    leaving: Array | None  # [heads, t, k]: the keys as they reach the chunk's end, where that is not a factor of tokens
    numbers: Array  # [h n, at least NUM_ROWS, c] float32
    scores: Array  # [p, h n, c, c]
    inverse: Array | None


def gates(beta: Array | None, g: Array) -> Array:
    """[h n, NUM_ROWS, c] float32 from beta and g [b, h, t]: each chunk's numbers per token."""
    g = g.astype(jnp.float32).reshape(-1, BLOCK)
    prefix, rest = lax.associative_scan(add_pairs, (g, jnp.zeros_like(g)), axis=1)
    after = jnp.cumsum(g[:, ::-1], axis=1)[:, ::-1]
    after = jnp.pad(after[:, 1:], ((0, 0), (0, 1)))
    strength = jnp.ones_like(g) if beta is None else beta.astype(jnp.float32).reshape(g.shape)
    total = jnp.broadcast_to(prefix[:, -1:], g.shape)
    return jnp.stack([prefix, rest, strength, jnp.exp(prefix), jnp.exp(after), jnp.exp(total)], axis=1)


def add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two numbers of twice float32's digits, each the sum of a pair (Knuth's two-sum)."""
    total = a[0] + b[0]
    part = total - a[0]
    lost = (a[0] - (total - part)) + (b[0] - part)
    lost = lost + (a[1] + b[1])
    result = total + lost
    return result, lost - (result - total)


def decays(given: Ref) -> Array:
    """Gamma, 0 above the diagonal, of one chunk's `gates`."""
    row, column = indices()
    total, rest = (
        each_row(row_numbers(given.at[i])) - each_column(column_numbers(given.at[i])) for i in (PREFIX, REST)
    )
    return jnp.where(row >= column, jnp.exp(total + rest), 0.0)


def at_level(block: Array, size: Array | int) -> Array:
    """Of a block what joins the later halves of 2 `size` tokens (rows) with the earlier ones (columns)."""
    row, column = indices()
    is_same_pair = (row & (-2 * size)) == (column & (-2 * size))
    return jnp.where(is_same_pair & ((row & size) != 0) & ((column & size) == 0), block, 0.0)


def inverse(a: Array, x_blocks: Operand, y_blocks: Operand) -> Array:
    """(I + a)^-1 of a strictly lower triangular block; `x_blocks` and `y_blocks` are scratch."""

    def double(_: Array, carries: tuple[Array, Array]) -> tuple[Array, Array]:
        x, size = carries
        store(x_blocks, x)
        store(y_blocks, at_level(a, size))
        plgpu.commit_smem()
        y = product((x_blocks, y_blocks))
        store(y_blocks, y)
        plgpu.commit_smem()
        return x - product((y_blocks, x_blocks)), 2 * size

    row, column = indices()
    x = jnp.where(row == column, 1.0, 0.0) - at_level(a, 1)
    return lax.fori_loop(0, BLOCK.bit_length() - 2, double, (x, jnp.int32(2)))[0]


def prepare(q: Array, k: Array, numbers: Array, *, scale: float, num_pieces: int, erases: bool) -> Chunks:
    """The chunks of q, k [heads, t, k] bfloat16 and `gates`, with an inverse where it `erases`."""
    num_chunks, key_blocks = q.shape[1] // BLOCK, q.shape[2] // BLOCK
    heads = numbers.shape[0] // num_chunks
    group = heads // q.shape[0]

    def kernel(q_ref: Ref, k_ref: Ref, numbers_ref: Ref, *rest: Ref) -> None:
        outs, (q_blocks, k_blocks, given, scratch, ready) = rest[: 1 + erases], rest[1 + erases :]
        head, chunk = lax.axis_index("h"), lax.axis_index("n")
        index = head * num_chunks + chunk
        tokens = pl.ds(chunk * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(numbers_ref.at[index], given, ready)
        for i in range(key_blocks):
            columns = pl.ds(i * BLOCK, BLOCK)
            for ref, buffer in ((q_ref, q_blocks), (k_ref, k_blocks)):
                plgpu.copy_gmem_to_smem(ref.at[lax.div(head, jnp.int32(group)), tokens, columns], buffer.at[i], ready)
        plgpu.barrier_wait(ready)

        places = pieces(scratch, max(num_pieces, 2 * INVERSE_PIECES))

        def send(out: Ref, value: Array) -> None:
            store(places[:num_pieces], value)
            plgpu.commit_smem()
            for i in range(num_pieces):
                plgpu.copy_smem_to_gmem(places[i], out.at[i * heads * num_chunks + index])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        gamma = decays(given)
        keys = [[k_blocks.at[i]] for i in range(key_blocks)]
        queries = [[q_blocks.at[i]] for i in range(key_blocks)]
        send(outs[0], scale * gamma * product(*((a, transposed(b)) for a, b in zip(queries, keys, strict=True))))
        if erases:
            row, column = indices()
            similar = product(*((key, transposed(key)) for key in keys))
            a = jnp.where(row > column, each_row(row_numbers(given.at[BETA])) * similar * gamma, 0.0)
            send(outs[1], inverse(a, places[:INVERSE_PIECES], places[INVERSE_PIECES : 2 * INVERSE_PIECES]))
        plgpu.wait_smem_to_gmem(0)

    square = jax.ShapeDtypeStruct((num_pieces * heads * num_chunks, BLOCK, BLOCK), jnp.bfloat16)
    results = gpu_kernel(
        kernel,
        out_type=[square] * (1 + erases),
        scratch_types=[
            blocks(key_blocks),
            blocks(key_blocks),
            plgpu.SMEM((NUM_ROWS, BLOCK), jnp.float32),
            blocks(max(num_pieces, 2 * INVERSE_PIECES)),
            plgpu.Barrier(num_arrivals=1 + 2 * key_blocks),
        ],
        grid=(heads, num_chunks),
        grid_names=("h", "n"),
        compiler_params=COMPILER_PARAMS,
        kernel_name="linear_attention_prepare",
    )(q, k, numbers)
    return Chunks(q, k, None, numbers, results[0], results[1] if erases else None)
