"""What the TPU's linear-attention kernels share: products, the triangular inverse, masks, VMEM. Letters: c chunk.

Everything works on values inside a kernel. What takes a list, one matrix per head, does each of its steps for all of
them before the next step: the matrix units then overlap products that do not depend on each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

PIECES = {"default": 1, "high": 2, "highest": 3}  # bfloat16 numbers whose sum stands for a float32 number
LANES = 128
SUBLANES = 8
BASE = 16
HALF = LANES // 2
VMEM_BUDGET = 13 * 2**20  # of the 16 MiB that v4 and v5e give a kernel by default; the compiler keeps some itself
CONTRACTIONS = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


def split(x: Array, pieces: int) -> list[Array]:
    """bfloat16 arrays that sum to x: 8 more bits with each, so that 3 are exact for float32. Of bfloat16, x alone."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found = [x.astype(jnp.bfloat16)]
    for _ in range(pieces - 1):
        x = x - found[-1].astype(jnp.float32)
        found.append(x.astype(jnp.bfloat16))
    return found


def dot(a: Array, b: Array, precision: str, contract: str = "nn") -> Array:
    """a b ("nn"), a b^T ("nt") or a^T b ("tn") of matrices, float32.

    Of float32 operands: 1 ("default"), 3 ("high") or 6 ("highest") bfloat16 products; of bfloat16 operands, which are
    exact, 1. One float32 operand costs 1, 2 or 3, so that a matrix of 0 and 1 in bfloat16 sums exactly at "highest".
    """
    most = PIECES[precision]
    pieces_a, pieces_b = split(a, most), split(b, most)
    products = [
        lax.dot_general(x, y, (CONTRACTIONS[contract], ((), ())), preferred_element_type=jnp.float32)
        for i, x in enumerate(pieces_a)
        for j, y in enumerate(pieces_b)
        if i + j < most
    ]
    return sum(products[-2::-1], products[-1])  # the smallest first


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def lower(c: int, *, strict: bool = False) -> Array:
    """[c, c] mask: column <= row, or < where strict."""
    row, column = iota((c, c), 0), iota((c, c), 1)
    return column < row if strict else column <= row


def inverse(matrices: Sequence[Array], precision: str) -> list[Array]:
    """(I + A)^-1 for the part of each A [c, c] float32 that is strictly below the diagonal; c is 16, 32, 64 or 128.

    Substitution in diagonal blocks of 16, then neighbours are merged, X21 = -X22 A21 X11, until one block is left. No
    power of A is formed: it would overflow or cancel where keys are alike. At least "high", also at "default".
    """
    c = matrices[0].shape[0]
    if precision == "highest" or c < HALF:
        blocks = [_expand(x, c) for x in _substitute([_compact(a) for a in matrices])]
        return _merge(blocks, matrices, "highest" if precision == "highest" else "high")
    if c == HALF:
        return [_whole(x)[:, :HALF] for x in _halves(matrices)[0]]
    blocks, below = _halves(matrices)
    firsts, seconds = blocks[: len(matrices)], blocks[len(matrices) :]
    between = _products(seconds, [_pieces(x) for x in _products([_pieces(_twice(x)) for x in below], firsts)])
    left = iota((HALF, LANES), 1) < HALF
    return [
        jnp.concatenate([jnp.where(left, _whole(x11), 0.0), jnp.where(left, -x21, _whole(x22))])
        for x11, x22, x21 in zip(firsts, seconds, between, strict=True)
    ]


@dataclass(frozen=True)
class Solver:
    """What `solve` multiplies with for one head: (I + A)^-1 [c, c], or the inverses of the diagonal blocks of 64 of
    I + A in pieces [64, 128] and, where there are two, A21 [64, 64] below them."""

    blocks: tuple[Array, ...]
    below: Array | None = None


def solvers(matrices: Sequence[Array], precision: str) -> list[Solver]:
    """For each (I + A)^-1 as in `inverse`; A is [64, 64] or [128, 128]."""
    if precision == "highest":
        return [Solver((x,)) for x in inverse(matrices, precision)]
    blocks, below = _halves(matrices)
    if not below:
        return [Solver((x,)) for x in blocks]
    number = len(matrices)
    return [Solver((blocks[i], blocks[i + number]), below[i]) for i in range(number)]


def solve(inverses: Sequence[Solver], rights: Sequence[Array], precision: str) -> list[Array]:
    """(I + A)^-1 r of every head; r [c, v] float32."""
    if precision == "highest":
        return [dot(x.blocks[0], r, precision) for x, r in zip(inverses, rights, strict=True)]

    def product(pieces: Array, r: Array) -> Array:
        return dot(pieces, jnp.concatenate([r, r]), precision)

    firsts = [product(x.blocks[0], r[:HALF]) for x, r in zip(inverses, rights, strict=True)]
    known = [dot(x.below, first, precision) for x, first in zip(inverses, firsts, strict=True) if x.below is not None]
    if not known:
        return firsts
    seconds = [product(x.blocks[1], r[HALF:] - y) for x, r, y in zip(inverses, rights, known, strict=True)]
    return [jnp.concatenate([x, y]) for x, y in zip(firsts, seconds, strict=True)]


def solve_transposed(inverses: Sequence[Solver], rights: Sequence[Array], precision: str) -> list[Array]:
    """(I + A)^-T r of every head; r [c, v] float32."""
    if precision == "highest":
        return [dot(x.blocks[0], r, precision, "tn") for x, r in zip(inverses, rights, strict=True)]

    def product(pieces: Array, r: Array) -> Array:
        both = dot(pieces, r, precision, "tn")
        return both[:HALF] + both[HALF:]

    lasts = [product(x.blocks[-1], r[-HALF:]) for x, r in zip(inverses, rights, strict=True)]
    known = [dot(x.below, y, precision, "tn") for x, y in zip(inverses, lasts, strict=True) if x.below is not None]
    if not known:
        return lasts
    firsts = [product(x.blocks[0], r[:HALF] - y) for x, r, y in zip(inverses, rights, known, strict=True)]
    return [jnp.concatenate([x, y]) for x, y in zip(firsts, lasts, strict=True)]


def _compact(a: Array) -> Array:
    """What is below the diagonal of the diagonal 16x16 blocks, side by side, [16, 128]; again from lane c on."""
    c = a.shape[0]
    lane = iota((BASE, c), 1)
    block = jnp.where(lane % BASE < iota((BASE, c), 0), lane // BASE, -1)
    compact = jnp.zeros((BASE, c), jnp.float32)
    for i in range(c // BASE):
        compact = jnp.where(block == i, a[i * BASE : (i + 1) * BASE], compact)
    return jnp.concatenate([compact] * (LANES // c), axis=1) if c < LANES else compact


def _substitute(compacts: list[Array]) -> list[Array]:
    """Inverses of the blocks of I + A, side by side, [16, 128]."""
    lane = iota((BASE, LANES), 1)
    identity = jnp.where(lane % BASE == iota((BASE, LANES), 0), 1.0, 0.0)
    upper, under = [identity[:SUBLANES]] * len(compacts), [identity[SUBLANES:]] * len(compacts)
    for row in range(BASE - 1):
        at = lane[:SUBLANES] // BASE * BASE + row
        found = upper if row < SUBLANES else under
        rows = [x[row % SUBLANES :][:1] for x in found]
        if row < SUBLANES:
            columns = [jnp.take_along_axis(a[:SUBLANES], at, axis=1) for a in compacts]
            upper = [x - column * y for x, column, y in zip(upper, columns, rows, strict=True)]
        columns = [jnp.take_along_axis(a[SUBLANES:], at, axis=1) for a in compacts]
        under = [x - column * y for x, column, y in zip(under, columns, rows, strict=True)]
    return [jnp.concatenate([x, y]) for x, y in zip(upper, under, strict=True)]


def _expand(compact: Array, c: int) -> Array:
    """The block diagonal matrix [c, c]."""
    compact = compact[:, :c]
    block = iota((BASE, c), 1) // BASE
    return jnp.concatenate([jnp.where(block == i, compact, 0.0) for i in range(c // BASE)])


def _merge(blocks: list[Array], matrices: Sequence[Array], precision: str) -> list[Array]:
    """Inverses [c, c] from those of the diagonal blocks of 16."""
    c, size = blocks[0].shape[0], BASE
    while size < c:
        products = [dot(_below(a, size), x, precision) for a, x in zip(matrices, blocks, strict=True)]
        seconds = [_odd(x, size) for x in blocks]
        products = [dot(x, _among_zeros(y, size), precision) for x, y in zip(seconds, products, strict=True)]
        blocks = [_replace_odd(x, y - z, size) for x, y, z in zip(blocks, seconds, products, strict=True)]
        size *= 2
    return blocks


def _below(a: Array, size: int) -> Array:
    """The blocks A21 of `size` below the diagonal, in their rows: [c / 2, lanes]."""
    rows = _odd(a, size)
    return jnp.where(_is_below(rows.shape, a.shape[0], size), rows, 0.0)


def _is_below(shape: tuple[int, ...], c: int, size: int) -> Array:
    return iota(shape, 1) % c // size == iota(shape, 0) // size * 2


def _odd(x: Array, size: int) -> Array:
    """Every second block of `size` rows."""
    return jnp.concatenate([x[i : i + size] for i in range(size, x.shape[0], 2 * size)])


def _among_zeros(odd: Array, size: int) -> Array:
    """Blocks of rows as every second one among zeros."""
    zeros = jnp.zeros((size, odd.shape[1]), odd.dtype)
    return jnp.concatenate([y for i in range(0, odd.shape[0], size) for y in (zeros, odd[i : i + size])])


def _replace_odd(x: Array, odd: Array, size: int) -> Array:
    blocks = range(0, odd.shape[0], size)
    return jnp.concatenate([y for i in blocks for y in (x[2 * i : 2 * i + size], odd[i : i + size])])


# A 64x64 matrix fills half the lanes, and its pieces hi and lo at "high" fill them all: [hi lo] in bfloat16. One pass
# through a 128x128 matrix unit, [hi lo] [hi lo; hi lo] = [M hi, M lo], has all the terms of a product.


def _halves(matrices: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    """Inverses of the diagonal blocks of 64 of I + A in pieces, all first blocks before all second ones; and A21."""
    c = matrices[0].shape[0]
    compacts = _substitute([_compact(a) for a in matrices])
    if c == HALF:
        return _merge_pieces([_expand_pieces(x) for x in compacts], [_twice(a) for a in matrices]), []
    left, first = iota((HALF, LANES), 1) < HALF, iota((BASE, LANES), 1) < HALF
    swapped = [pltpu.roll(a, HALF, 1) for a in matrices]
    doubled = [jnp.where(left, a[:HALF], s[:HALF]) for a, s in zip(matrices, swapped, strict=True)]
    doubled += [jnp.where(left, s[HALF:], a[HALF:]) for a, s in zip(matrices, swapped, strict=True)]
    other = [pltpu.roll(x, HALF, 1) for x in compacts]
    starts = [jnp.where(first, x, y) for x, y in zip(compacts, other, strict=True)]
    starts += [jnp.where(first, y, x) for x, y in zip(compacts, other, strict=True)]
    return _merge_pieces([_expand_pieces(x) for x in starts], doubled), [a[HALF:, :HALF] for a in matrices]


def _twice(x: Array) -> Array:
    return jnp.concatenate([x, x], axis=1)


def _expand_pieces(compact: Array) -> Array:
    """Pieces [64, 128] of the block diagonal matrix whose blocks stand side by side twice."""
    block = iota((BASE, LANES), 1) % HALF // BASE
    pieces = _split_lanes(compact)
    return jnp.concatenate([jnp.where(block == i, pieces, 0.0) for i in range(HALF // BASE)]).astype(jnp.bfloat16)


def _split_lanes(x: Array) -> Array:
    """[hi lo] of [M M], exact in bfloat16 but for what lo rounds off."""
    return jnp.where(iota(x.shape, 1) < HALF, x, x - x.astype(jnp.bfloat16).astype(jnp.float32))


def _pieces(x: Array) -> Array:
    return _split_lanes(x).astype(jnp.bfloat16)


def _whole(pieces: Array) -> Array:
    """[M M] in float32."""
    x = pieces.astype(jnp.float32)
    return x + pltpu.roll(x, HALF, 1)


def _products(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
    """[M M] for the products M of matrices in pieces."""
    both = [dot(x, jnp.concatenate([y, y]), "default") for x, y in zip(a, b, strict=True)]
    return [x + pltpu.roll(x, HALF, 1) for x in both]


def _join(x: Array, y: Array) -> Array:
    """x + y in bfloat16 where all but one of the two is +0: without arithmetic, which v5e would do in float32."""
    bits = pltpu.bitcast(x, jnp.int32) | pltpu.bitcast(y, jnp.int32)
    return pltpu.bitcast(bits, jnp.bfloat16)


def _merge_pieces(blocks: list[Array], matrices: list[Array]) -> list[Array]:
    """`_merge` in pieces; `matrices` are [A A], 64x128."""
    size = BASE
    while size < HALF:
        below = [_pieces(_below(a, size)) for a in matrices]
        products = _products(below, blocks)
        seconds = [_odd(x, size) for x in blocks]
        products = _products(seconds, [_among_zeros(_pieces(y), size) for y in products])
        merged = [_join(y, _pieces(0.0 - z)) for y, z in zip(seconds, products, strict=True)]
        blocks = [_replace_odd(x, y, size) for x, y in zip(blocks, merged, strict=True)]
        size *= 2
    return blocks


def vmem_bytes(shape: Sequence[int], dtype: Any) -> int:
    """What an array takes in VMEM: its last two dimensions in whole tiles."""
    size = jnp.dtype(dtype).itemsize
    *rest, rows, lanes = (1, *shape)
    tile = SUBLANES * 4 // size
    return int(np.prod(rest)) * pl.cdiv(rows, tile) * tile * pl.cdiv(lanes, LANES) * LANES * size


def heads_per_step(number: int, bytes_per_head: int, most: int, budget: int = VMEM_BUDGET) -> int:
    """The largest divisor of `number` that is at most `most` and fits into the budget; 1 if none does."""
    fitting = [n for n in range(1, number + 1) if number % n == 0 and n <= most and n * bytes_per_head <= budget]
    return max(fitting, default=1)


def params(vmem: int = 0) -> pltpu.CompilerParams:
    """Grid (batch, heads, chunks): the chunks follow each other; `vmem` bytes where a kernel needs more than usual."""
    order = ("parallel", "parallel", "arbitrary")
    if vmem <= VMEM_BUDGET:
        return pltpu.CompilerParams(dimension_semantics=order)
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=vmem * 5 // 4 + 3 * 2**20)
