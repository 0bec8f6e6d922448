"""Scores under a decay per key channel, exact for any decay, inside TPU kernels. Letters: c chunk, k key dim, n tiles.

    P_ij = sum_k q_ik k_jk exp(sum_{j<l<=i} g_lk)   for i > j

A pair i > j belongs to one level b = c/2, ..., 2, 1: i is in the second half and j in the first half of the same block
of 2b rows. There the decay splits at the boundary between the halves into two sums, D_i over (boundary, i] and D_j over
(j, boundary]. Both are sums of terms that are not positive: nothing overflows, nothing cancels and no bound on the
decay is needed. With Z_b = exp(D) q in second halves and exp(D) k in first halves, P is Z_b Z_b^T wherever level b is.

Rows are held as [n, 8, k], one register each where k is 128: a level of 8 or more rows chooses among registers, which
is free, and a smaller one among the rows of each.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels.linear_attention.tpu_blocks import SUBLANES, dot, iota

PER_LOG = 1 / math.log(2)  # the machine has exp2; exp multiplies first


@dataclass(frozen=True)
class Decays:
    """exp of sums of g over a chunk."""

    before: Array
    """From the chunk's start up to each row, [n, 8, k]."""
    after: Array
    """From after each row to the chunk's end, [n, 8, k]."""
    whole: Array
    """[1, k]."""


@dataclass(frozen=True)
class Level:
    """Level b of a chunk, as the adjoint needs it."""

    b: int
    decay: Array
    """exp(D) [n, 8, k]."""
    mixed: list[Array]
    """Z_b as an operand [c, k], for each kind of row."""


@dataclass(frozen=True)
class Scores:
    """Scores of a chunk for each kind of row, and what they are made of."""

    matrices: list[Array]
    """P [c, c] below the diagonal, or its transpose above it, and 0 elsewhere."""
    levels: list[Level]
    """From the smallest to the largest."""
    decays: Decays


def tiled(x: Array) -> Array:
    """[c, k] as [n, 8, k] in float32."""
    return x.astype(jnp.float32).reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1])


def flat(x: Array) -> Array:
    return x.reshape(x.shape[0] * SUBLANES, x.shape[2])


def rounded(x: Array, precision: str) -> Array:
    """An operand of several products, once in the format in which one pass takes it."""
    return x.astype(jnp.bfloat16) if precision == "default" else x


def scores(rows: Sequence[Array], k: Array, g: Array, precision: str, *, transposed: Sequence[bool]) -> Scores:
    """Of each of `rows` (q, or q and k) with k, all [n, 8, k]."""
    c = k.shape[0] * SUBLANES
    matrices, kept = [jnp.zeros((c, c), jnp.float32)] * len(rows), []
    for step in levels(g):
        if isinstance(step, Decays):
            return Scores(matrices, kept, step)
        b, decay = step
        mixed = [rounded(flat(pick(row, k, b) * decay), precision) for row in rows]
        kept.append(Level(b, decay, mixed))
        for i, z in enumerate(mixed):
            left = halves(z, b, second=not transposed[i])
            product = dot(left, z if transposed[i] else mixed[0], precision, "nt")  # first halves are the same in all
            matrices[i] = place(product, matrices[i], b, transposed[i])
    raise AssertionError("levels end with the decays over the chunk")


def levels(g: Array) -> Iterator[tuple[int, Array] | Decays]:
    """b and exp(D) [n, 8, k] for b = 1, 2, 4, ..., c/2, and then the decays over the chunk, from g [n, 8, k]."""
    number, zero = g.shape[0], jnp.zeros_like(g)
    g = g * PER_LOG
    other = partner(g, 1)
    yield 1, pick(jnp.exp2(g), jnp.ones_like(g), 1)
    # Sums within blocks of b rows: up to a row, after it, of all rows.
    before, after, block = pick(g + other, g, 1), pick(zero, other, 1), g + other
    for b in (2, 4):
        yield b, jnp.exp2(pick(before, after, b))
        other = partner(block, b)
        before, after = before + pick(other, zero, b), after + pick(zero, other, b)
        block = block + other
    blocks = [block[i : i + 1] for i in range(number)]
    b = SUBLANES
    while b < number * SUBLANES:
        yield b, jnp.exp2(pick(before, after, b))
        size = b // SUBLANES
        befores, afters = ([x[i : i + size] for i in range(0, number, size)] for x in (before, after))
        before = jnp.concatenate([x + blocks[i - 1] if i % 2 else x for i, x in enumerate(befores)])
        after = jnp.concatenate([x if i % 2 else x + blocks[i + 1] for i, x in enumerate(afters)])
        blocks = [x + y for x, y in zip(blocks[::2], blocks[1::2], strict=True)]
        b *= 2
    yield Decays(before=jnp.exp2(before), after=jnp.exp2(after), whole=jnp.exp2(blocks[0][0, :1]))


def pick(second: Array, first: Array, b: int) -> Array:
    """[n, 8, k]: `second` in the second halves of the blocks of 2b rows and `first` in their first halves."""
    if second is first:
        return first
    if b < SUBLANES:
        return jnp.where(lax.broadcasted_iota(jnp.int32, first.shape, 1) // b % 2 == 1, second, first)
    size = b // SUBLANES
    return jnp.concatenate([(first, second)[i % 2][i * size : (i + 1) * size] for i in range(first.shape[0] // size)])


def partner(x: Array, b: int) -> Array:
    """Row i ^ b for row i of [n, 8, k]; b is 1, 2 or 4."""
    if 2 * b == SUBLANES:
        return pltpu.roll(x, b, 1)
    return pick(pltpu.roll(x, b, 1), pltpu.roll(x, SUBLANES - b, 1), b)


def halves(x: Array, b: int, *, second: bool) -> Array:
    """The rows of [c, k] in second halves or in first; all rows where the halves are smaller than a register."""
    if b < SUBLANES:
        return x
    return jnp.concatenate([x[i : i + b] for i in range(b if second else 0, x.shape[0], 2 * b)])


def place(product: Array, matrix: Array, b: int, transposed: bool) -> Array:
    """`matrix` [c, c] with the scores of level b from the product with `halves`.

    Levels come from the smallest to the largest: what a row gets beyond level b, seen from the diagonal, is replaced
    later.
    """
    c = matrix.shape[0]
    if b < SUBLANES:
        row, column = iota((c, c), 0) // b, iota((c, c), 1) // b
        here = (row % 2 == 0) & (column > row) if transposed else (row % 2 == 1) & (column < row)
        return jnp.where(here, product, matrix)
    column, blocks = iota((b, c), 1), []
    for i in range(0, c, 2 * b):
        new, middle = product[i // 2 : i // 2 + b], i + b
        first, second = matrix[i:middle], matrix[middle : middle + b]
        if transposed:
            blocks += [jnp.where(column >= middle, new, first), second]
        else:
            blocks += [first, jnp.where(column < middle, new, second)]
    return jnp.concatenate(blocks)


def with_diagonal(matrix: Array, diagonal: Array) -> Array:
    """[c, c] with `diagonal` [c, 1] on it."""
    shape = matrix.shape[0], matrix.shape[1]
    return jnp.where(iota(shape, 0) == iota(shape, 1), diagonal, matrix)


def scores_adjoint(
    d_scores: Sequence[Array], rows: Sequence[Array], k: Array, kept: Sequence[Level],
    d_rows: Sequence[Array], d_k: Array, precision: str,
) -> tuple[list[Array], Array, Array]:  # fmt: skip
    """Cotangents of the rows, of k in its columns, and of g, all [n, 8, k].

    `d_scores` [c, c] has for each kind of row the cotangent of P below the diagonal and its transpose above it.
    `d_rows` is what reaches the rows with the decay from the chunk's start, `d_k` what reaches k with the decay to the
    chunk's end; g gets its part of these too. The cotangent of D is Z_b times that of Z_b, and a g is in the D of rows
    around it: no difference of sums q dq - k dk is formed, whose terms nearly cancel.
    """
    d_rows, c = list(d_rows), d_scores[0].shape[0]
    d_scores = [rounded(x, precision) for x in d_scores]
    facing = {}
    for level in reversed(kept):
        b = level.b
        facing[b] = pick(weighted(rows, d_rows), k * d_k, b)
        here = (iota((c, c), 0) // b ^ 1) == iota((c, c), 1) // b
        for i, z in enumerate(level.mixed):
            product = dot(jnp.where(here, d_scores[i], jnp.zeros_like(d_scores[i])), z, precision)
            d_mixed = tiled(product) * level.decay
            d_rows[i] = pick(d_rows[i] + d_mixed, d_rows[i], b)
            d_k = pick(d_k, d_k + d_mixed, b)
    return d_rows, d_k, from_other_halves(facing) + weighted(rows, d_rows)


def weighted(rows: Sequence[Array], d_rows: Sequence[Array]) -> Array:
    products = [row * d for row, d in zip(rows, d_rows, strict=True)]
    return sum(products[1:], products[0])


def from_other_halves(facing: dict[int, Array]) -> Array:
    """In each row, over all levels b, the sum of facing[b] over the half of b rows opposite to its own, [n, 8, k]."""
    number = facing[1].shape[0]
    sums, b = [jnp.zeros_like(facing[1][:1])], number * SUBLANES // 2  # not yet over the rows of a register
    while b >= SUBLANES:
        size = b // SUBLANES
        totals = [facing[b][i : i + size].sum(axis=0, keepdims=True) for i in range(0, number, size)]
        sums = [sums[i // 2] + totals[i ^ 1] for i in range(len(totals))]
        b //= 2
    result = jnp.concatenate(sums)
    for b in (4, 2, 1):
        result = result + partner(result + facing[b], b)
    return result
