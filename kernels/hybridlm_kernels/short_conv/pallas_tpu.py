"""The short convolution as Pallas kernels for TPU. Letters: b batch, t time, d channels, w taps.

Each operand is read once and each result written once, in the natural [b, t, d] layout (see tpu_scan.py for blocks and
groups). The rows that reach over a group's edge, 8 of them, wait in VMEM. The adjoint computes the sums again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from hybridlm_kernels import tpu_scan
from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.short_conv.activations import ACTIVATIONS
from hybridlm_kernels.tpu_scan import ABSENT, GROUP, LANES, Tiling

DTYPES = ("bfloat16", "float32")
EDGE = 8  # rows kept from one group to the next: the rows of a float32 tile
REACH = ABSENT + 2  # a token that sees r inputs has the kind REACH + r, padding REACH - 1


def supports(x: Array | jax.ShapeDtypeStruct, w: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels cannot serve; None where they can."""
    for operand in (x, w):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    return None if w.shape[0] <= EDGE + 1 else f"takes at most {EDGE + 1} taps, not {w.shape[0]}"


@partial(jax.jit, static_argnames=("activation", "interpret"))
def forward(
    x: Array, w: Array, bias: Array | None, halo: Array, reach: Array | None,
    *, activation: str | None, interpret: Any = False,
) -> Array:  # fmt: skip
    """y [b, t, d]; `halo` [b, w-1, d] are the inputs before x, `reach` [b, t] how many of them each token may see."""
    y = out_struct(x.shape, x.dtype, x, w, halo)
    tiles = tpu_scan.tiling((x, y), scratch=2, backward=False)
    kinds = _kinds(tiles, reach, w.shape[0])
    return pl.pallas_call(
        partial(_forward_kernel, activation=activation),
        grid=tiles.grid,
        in_specs=[tiles.tokens(), *_weights(tiles, w, bias), _edge(tiles), tiles.kinds(kinds)],
        out_specs=tiles.tokens(),
        out_shape=y,
        scratch_shapes=[_rows(tiles), tiles.spread(kinds)],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="short_conv",
    )(x, *_in_float32(w, bias), _ends(halo), kinds)


def _forward_kernel(
    x: Any, w: Any, bias: Any, halo: Any, kinds: Any, y: Any, earlier: Any, spread: Any, *, activation: str | None
) -> None:
    """`earlier` holds the 8 rows before a group."""
    tpu_scan.start((earlier,), (halo,))
    tpu_scan.spread_kinds(kinds, spread)

    def group(first: Array) -> None:
        for at in _lane_slices(x, LANES):
            (rows,) = tpu_scan.load((x,), first, at)
            window = jnp.concatenate([earlier[:, at], rows])
            total = _sum(window, w, bias, at, tpu_scan.kinds_of(spread, first, at))
            y[pl.ds(first, GROUP), at] = activate(total, activation, y).astype(y.dtype)
            earlier[:, at] = rows[GROUP - EDGE :]

    _over_groups(x.shape[0], False, group)


@partial(jax.jit, static_argnames=("activation", "interpret"))
def adjoint(
    x: Array, w: Array, bias: Array | None, halo: Array, reach: Array | None, dy: Array,
    *, activation: str | None, interpret: Any = False,
) -> tuple[Array, Array, Array | None, Array]:  # fmt: skip
    """The cotangents of x, w, bias and halo, those of the weights in float32."""
    b, t, d = x.shape
    num_taps, like = w.shape[0], (x, w, halo, dy)
    dx = out_struct(x.shape, x.dtype, *like)
    tiles = tpu_scan.tiling((x, dy, dx), scratch=num_taps + 5, backward=True)
    if reach is None and tiles.is_ragged:
        reach = jnp.full((b, t), num_taps - 1)
    kinds = _kinds(tiles, reach, num_taps)
    sums = pl.BlockSpec((None, num_taps + 1, tiles.lanes), lambda i, j, k: (i, 0, j))
    dx, dw, dhalo = pl.pallas_call(
        partial(_adjoint_kernel, activation=activation),
        grid=tiles.grid,
        in_specs=[
            tiles.tokens(), tiles.group_before(False), *_weights(tiles, w, bias), _edge(tiles), tiles.tokens(),
            tiles.kinds(kinds),
        ],
        out_specs=[tiles.tokens(), sums, _edge(tiles)],
        out_shape=[
            dx, out_struct((b, num_taps + 1, d), jnp.float32, *like), out_struct((b, EDGE, d), jnp.float32, *like),
        ],
        scratch_shapes=[
            _rows(tiles), [_rows(tiles)] * (num_taps + 1),
            tiles.spread(kinds), None if kinds is None else pltpu.VMEM((EDGE, LANES), jnp.int32),
        ],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="short_conv_adjoint",
    )(x, x, *_in_float32(w, bias), _ends(halo), dy, kinds)  # fmt: skip
    dw = dw.sum(axis=0)
    return dx, dw[:num_taps], None if bias is None else dw[num_taps], dhalo[:, EDGE - num_taps + 1 :]


def _adjoint_kernel(
    x: Any, passed: Any, w: Any, bias: Any, halo: Any, dy: Any, kinds: Any, dx: Any, dw: Any, dhalo: Any,
    later: Any, sums: list[Any], spread: Any, later_kinds: Any, *, activation: str | None,
) -> None:  # fmt: skip
    """Against time. `later` holds the gradients of the sums of the 8 tokens after a group."""
    num_taps, rows = w.shape[0], x.shape[0]
    is_last = pl.program_id(2) == pl.num_programs(2) - 1

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for ref in (later, *sums) if later_kinds is None else (later, *sums, later_kinds):
            ref[...] = jnp.zeros_like(ref)

    tpu_scan.spread_kinds(kinds, spread)

    def group(first: Array) -> None:
        for at in _lane_slices(x, 2 * LANES):
            kind, after_kind = _kinds_around(spread, later_kinds, first, rows, at)
            value, dsum = _present(tpu_scan.load((x, dy), first, at), kind)
            window = jnp.concatenate([_before(x, passed, halo, first, at, is_last), value])
            total = _sum(window, w, bias, at, kind)
            (dsum,) = jax.vjp(lambda v: activate(v, activation, x), total)[1](dsum)
            after = jnp.concatenate([dsum, later[:, at]])
            dvalue = jnp.zeros_like(value)
            for j in range(num_taps):
                dvalue += _tap(w, j, at) * _moved(_seen(after, after_kind, j), -j)[:GROUP]
                product = _seen(dsum * _moved(window, j)[EDGE:], kind, j)
                sums[num_taps - 1 - j][:, at] += product[:EDGE] + product[EDGE:]
            sums[num_taps][:, at] += dsum[:EDGE] + dsum[EDGE:]
            dx[pl.ds(first, GROUP), at] = dvalue.astype(dx.dtype)
            later[:, at] = dsum[:EDGE]

    _over_groups(rows, True, group)
    if later_kinds is not None:
        later_kinds[...] = spread[:EDGE, :]

    @pl.when(is_last)
    def _() -> None:
        for i, ref in enumerate(sums):
            dw[i : i + 1, :] = jnp.sum(ref[...], axis=0, keepdims=True)
        for at in tpu_scan.lane_slices((x,)):
            kind = None if later_kinds is None else _in_lanes(later_kinds[...], at)
            dvalue = jnp.zeros((EDGE, at.size), jnp.float32)
            for j in range(1, num_taps):
                first_tokens = jnp.concatenate([jnp.zeros_like(dvalue), _seen(later[:, at], kind, j)])
                dvalue += _tap(w, j, at) * _moved(first_tokens, -j)[:EDGE]
            dhalo[:, at] = dvalue


def _sum(window: Array, w: Any, bias: Any, at: Any, kinds: Array | None) -> Array:
    """The weighted inputs of a group, `window` being the 8 rows before it and its own."""
    shape = GROUP, at.size
    total = jnp.zeros(shape, jnp.float32) if bias is None else jnp.broadcast_to(bias[:, at], shape)
    for j in range(w.shape[0]):
        total += _seen(_tap(w, j, at) * _moved(window, j)[EDGE:], kinds, j)
    return total


def _tap(w: Any, j: int, at: Any) -> Array:
    """The weight of the input j before a token, [1, lanes]."""
    last = w.shape[0] - 1
    return w[last - j : last - j + 1, at]


def activate(sums: Array, activation: str | None, stored: Any) -> Array:
    """SiLU through tanh, a third of the work, where the result is `stored` in bfloat16, whose rounding hides the error
    of 1e-7 but for sums below -8."""
    if activation == "silu" and stored.dtype == jnp.bfloat16:
        return 0.5 * sums * (1.0 + jnp.tanh(0.5 * sums))
    return ACTIVATIONS[activation](sums)


def _over_groups(rows: int, backward: bool, body: Callable[[Array], None]) -> None:
    """`body(first row)` for every group of a block."""
    last = rows // GROUP - 1

    def step(i: Array, nothing: tuple[()]) -> tuple[()]:
        body(pl.multiple_of((last - i if backward else i) * GROUP, GROUP))
        return nothing

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(last + 1), step, ())


def _seen(values: Array, kinds: Array | None, j: int) -> Array:
    """Zeros where a token may not see the input j before it."""
    return values if kinds is None else jnp.where(kinds >= REACH + j, values, 0.0)


def _present(planes: tuple[Array, ...], kinds: Array | None) -> tuple[Array, ...]:
    """Zeros beyond the end of time, where a block holds whatever there was."""
    return planes if kinds is None else tuple(jnp.where(kinds == ABSENT, 0.0, plane) for plane in planes)


def _moved(rows: Array, j: int) -> Array:
    """The rows j later, or -j earlier, around the edge."""
    return pltpu.roll(rows, j % rows.shape[0], 0) if j else rows


def _kinds_around(spread: Any, later: Any, first: Array, rows: int, at: Any) -> tuple[Array | None, Array | None]:
    """The kinds of a group, and of it with the 8 tokens after it, which may be of the next block."""
    if spread is None:
        return None, None
    kinds = spread[pl.ds(first, GROUP), :]
    here = spread[pl.ds(pl.multiple_of(jnp.minimum(first + GROUP, rows - GROUP), EDGE), EDGE), :]
    after = jnp.concatenate([kinds, jnp.where(first + GROUP == rows, later[...], here)])
    return _in_lanes(kinds, at), _in_lanes(after, at)


def _in_lanes(kinds: Array, at: Any) -> Array:
    return jnp.tile(kinds, (1, pl.cdiv(at.size, LANES)))[:, : at.size]


def _lane_slices(x: Any, width: int) -> list[Any]:
    """A block's lanes, as many at a time as cost least by the compiler's schedule."""
    return [pl.ds(first, min(width, x.shape[1] - first)) for first in range(0, x.shape[1], width)]


def _before(x: Any, passed: Any, halo: Any, first: Array, at: Any, is_first_block: Array) -> Array:
    """The 8 rows before the group at row `first`."""
    (edge,) = tpu_scan.load((passed,), 0, at)
    (other,) = tpu_scan.load((x,), pl.multiple_of(jnp.maximum(first - GROUP, 0), GROUP), at)
    edge = jnp.where(is_first_block, halo[:, at], edge[GROUP - EDGE :])
    return jnp.where(first == 0, edge, other[GROUP - EDGE :])


def _rows(tiles: Tiling) -> Any:
    return pltpu.VMEM((EDGE, tiles.lanes), jnp.float32)


def _kinds(tiles: Tiling, reach: Array | None, num_taps: int) -> Array | None:
    return None if reach is None else tiles.lay_out(jnp.minimum(reach, num_taps - 1) + REACH)


def _weights(tiles: Tiling, w: Array, bias: Array | None) -> tuple[Any, Any]:
    taps = pl.BlockSpec((w.shape[0], tiles.lanes), lambda i, j, k: (0, j))
    return taps, None if bias is None else tiles.weights()


def _in_float32(w: Array, bias: Array | None) -> tuple[Array, Array | None]:
    return w.astype(jnp.float32), None if bias is None else bias.astype(jnp.float32)[None]


def _edge(tiles: Tiling) -> pl.BlockSpec:
    return pl.BlockSpec((None, EDGE, tiles.lanes), lambda i, j, k: (i, 0, j))


def _ends(halo: Array) -> Array:
    """The halo as the last of 8 rows."""
    return jnp.pad(halo.astype(jnp.float32), ((0, 0), (EDGE - halo.shape[1], 0), (0, 0)))
