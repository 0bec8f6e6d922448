"""The linear scan as Pallas kernels for TPU. Letters: b batch, t time, d channels.

Each operand is read once and each result written once, in the natural [b, t, d] layout; only the state, [d] float32, is
kept between blocks of time (see tpu_scan.py). The adjoint is the same scan against time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from hybridlm_kernels import tpu_scan
from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.planes import Planes, planes_of, times, whole, widen
from hybridlm_kernels.segments import CONTINUE, PADDING
from hybridlm_kernels.tpu_scan import ABSENT, Before, Refs

DTYPES = ("bfloat16", "float32", "complex64")


def supports(a: Array | jax.ShapeDtypeStruct, x: Array | jax.ShapeDtypeStruct, **_: Any) -> str | None:
    """Why the kernels cannot serve; None where they can."""
    for operand in (a, x):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    return None


@partial(jax.jit, static_argnames=("reverse", "interpret"))
def forward(
    a: Array, x: Array, h0: Array, kinds: Array | None, *, reverse: bool, interpret: Any = False
) -> tuple[Array, Array]:
    """h_t = a_t h_{t-1} + x_t: h [b, t, d] in the operands' dtype and the last state [b, d]."""
    dtype = jnp.result_type(a, x)
    ap, xp, hp = planes_of(a), planes_of(x), planes_of(h0[:, None].astype(carry_dtype(dtype)))
    h_like = out_planes(x.shape, dtype, a, x, h0)
    tiles = tpu_scan.tiling((*ap, *xp, *h_like), scratch=len(ap) + len(hp), backward=reverse)
    kinds = tiles.lay_out(kinds)
    tokens, channels = tiles.tokens(), tiles.channels()
    h, last = pl.pallas_call(
        partial(_forward_kernel, reverse=reverse),
        grid=tiles.grid,
        in_specs=[each(ap, tokens), each(xp, tokens), each(hp, channels), tiles.kinds(kinds)],
        out_specs=[each(h_like, tokens), each(hp, channels)],
        out_shape=[h_like, each(hp, out_struct(hp[0].shape, jnp.float32, a, x, h0))],
        scratch_shapes=[tiles.groups(len(ap)), tiles.groups(len(hp)), tiles.carries(len(hp)), tiles.spread(kinds)],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="linear_scan",
    )(ap, xp, hp, kinds)
    return whole(h), whole(last)[:, 0]


def _forward_kernel(
    a: Refs, x: Refs, h0: Refs, kinds: Any, h: Refs, last: Refs,
    decays: Refs, values: Refs, carry: Refs, spread: Any, *, reverse: bool,
) -> None:  # fmt: skip
    tpu_scan.start(carry, h0)
    tpu_scan.spread_kinds(kinds, spread)

    def group(first: Array, slot: int, state: Planes) -> Planes:
        for at in tpu_scan.lane_slices(x):
            kind = tpu_scan.kinds_of(spread, first, at)
            tpu_scan.store(decays, slot, at, tpu_scan.kept(tpu_scan.load(a, first, at), kind))
            value = tpu_scan.masked(tpu_scan.load(x, first, at), kind, PADDING)
            tpu_scan.store(values, slot, at, widen(value, len(h)))
        state = tpu_scan.scan_rows(tpu_scan.forwards, decays, values, slot, state, reverse)
        for at in tpu_scan.lane_slices(x):
            tpu_scan.store(h, first, at, tpu_scan.load(values, slot, at))
        return state

    tpu_scan.over_groups(x[0].shape[0], reverse, group, carry)
    tpu_scan.finish(carry, last)


@partial(jax.jit, static_argnames=("reverse", "x_dtype", "interpret"))
def adjoint(
    a: Array, h: Array, h0: Array, dh: Array, dh_last: Array, kinds: Array | None,
    *, reverse: bool, x_dtype: jnp.dtype, interpret: Any = False,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """u_t = dh_t + a_{t+1} u_{t+1}, dx_t = u_t, da_t = u_t h_{t-1}, and what reaches h0, [b, d]."""
    ap, hp, dp = planes_of(a), planes_of(h), planes_of(dh.astype(h.dtype))
    carried = carry_dtype(h.dtype)
    sp, cp = planes_of(h0[:, None].astype(carried)), planes_of(dh_last[:, None].astype(carried))
    like = (a, h, h0, dh, dh_last)
    da_like, dx_like = out_planes(h.shape, a.dtype, *like), out_planes(h.shape, x_dtype, *like)
    tiles = tpu_scan.tiling((*ap, *hp, *dp, *da_like, *dx_like), scratch=len(ap) + len(hp), backward=not reverse)
    kinds = tiles.lay_out(kinds)
    tokens, channels, before = tiles.tokens(), tiles.channels(), tiles.group_before(reverse)
    da, dx, dh0 = pl.pallas_call(
        partial(_adjoint_kernel, reverse=reverse),
        grid=tiles.grid,
        in_specs=[
            each(ap, tokens), each(hp, tokens), each(hp, before), each(sp, channels), each(dp, tokens),
            each(cp, channels), tiles.kinds(kinds),
        ],
        out_specs=[each(da_like, tokens), each(dx_like, tokens), each(cp, channels)],
        out_shape=[da_like, dx_like, each(cp, out_struct(cp[0].shape, jnp.float32, *like))],
        scratch_shapes=[
            tiles.groups(len(ap)), tiles.groups(len(hp)), tiles.halves(len(hp)), tiles.carries(len(hp)),
            tiles.spread(kinds),
        ],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="linear_scan_adjoint",
    )(ap, hp, hp, sp, dp, cp, kinds)  # fmt: skip
    return whole(da), whole(dx), whole(dh0)[:, 0]


def _adjoint_kernel(
    a: Refs, h: Refs, passed: Refs, h0: Refs, dh: Refs, dh_last: Refs, kinds: Any, da: Refs, dx: Refs, dh0: Refs,
    decays: Refs, values: Refs, edges: Refs, carry: Refs, spread: Any, *, reverse: bool,
) -> None:  # fmt: skip
    tpu_scan.start(carry, dh_last)
    tpu_scan.spread_kinds(kinds, spread)
    is_start = pl.program_id(2) == pl.num_programs(2) - 1
    before = Before(h, passed, h0, edges, spread, reverse=reverse, is_start=is_start)

    def group(first: Array, slot: int, state: Planes) -> Planes:
        for at in tpu_scan.lane_slices(h):
            kind = tpu_scan.kinds_of(spread, first, at)
            tpu_scan.store(decays, slot, at, tpu_scan.kept(tpu_scan.load(a, first, at), kind))
            tpu_scan.store(values, slot, at, tpu_scan.masked(tpu_scan.load(dh, first, at), kind, ABSENT))
        state = tpu_scan.scan_rows(tpu_scan.adjoint, decays, values, slot, state, not reverse)
        for at in tpu_scan.lane_slices(h):
            kind, u = tpu_scan.kinds_of(spread, first, at), tpu_scan.load(values, slot, at)
            tpu_scan.store(dx, first, at, tpu_scan.masked(u, kind, PADDING))
            slope = times(u, before(first, at), len(da))
            tpu_scan.store(da, first, at, tpu_scan.masked(slope, kind, CONTINUE + 1))
        return state

    tpu_scan.over_groups(h[0].shape[0], not reverse, group, carry)
    tpu_scan.finish(carry, dh0)


@partial(jax.jit, static_argnames=("reverse", "premultiplied", "interpret"))
def summary(
    a: Array, x: Array, kinds: Array | None, *, reverse: bool, premultiplied: bool, interpret: Any = False
) -> tuple[Array, Array]:
    """What all of time does to a state s: s -> decay s + added, both [b, d]; `premultiplied`: s <- a_t (s + x_t)."""
    dtype = jnp.result_type(a, x)
    ap, xp = planes_of(a), planes_of(x)
    b, _, d = x.shape
    states = out_planes((b, 1, d), carry_dtype(dtype), a, x)
    tiles = tpu_scan.tiling((*ap, *xp), scratch=len(ap) + len(states), backward=reverse)
    kinds = tiles.lay_out(kinds)
    tokens, channels = tiles.tokens(), tiles.channels()
    decay, added = pl.pallas_call(
        partial(_summary_kernel, reverse=reverse, premultiplied=premultiplied),
        grid=tiles.grid,
        in_specs=[each(ap, tokens), each(xp, tokens), tiles.kinds(kinds)],
        out_specs=[each(ap, channels), each(states, channels)],
        out_shape=[states[: len(ap)], states],
        scratch_shapes=[tiles.groups(len(ap)), tiles.groups(len(states)), tiles.spread(kinds)],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="linear_scan_summary",
    )(ap, xp, kinds)
    return whole(decay)[:, 0].astype(carry_dtype(dtype)), whole(added)[:, 0]


def _summary_kernel(
    a: Refs, x: Refs, kinds: Any, decay: Refs, added: Refs, decays: Refs, values: Refs, spread: Any,
    *, reverse: bool, premultiplied: bool,
) -> None:  # fmt: skip
    tpu_scan.start_summary(decay, added)
    tpu_scan.spread_kinds(kinds, spread)
    step = tpu_scan.total(tpu_scan.adjoint if premultiplied else tpu_scan.forwards, len(decay))

    def group(first: Array, slot: int, carry: Planes) -> Planes:
        for at in tpu_scan.lane_slices(x):
            kind = tpu_scan.kinds_of(spread, first, at)
            tpu_scan.store(decays, slot, at, tpu_scan.kept(tpu_scan.load(a, first, at), kind))
            value = tpu_scan.masked(tpu_scan.load(x, first, at), kind, ABSENT if premultiplied else PADDING)
            tpu_scan.store(values, slot, at, widen(value, len(added)))
        return tpu_scan.scan_rows(step, decays, values, slot, carry, reverse)

    tpu_scan.over_groups(x[0].shape[0], reverse, group, (*decay, *added))


def out_planes(shape: tuple[int, ...], dtype: jnp.dtype, *like: Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return (out_struct(shape, jnp.float32, *like),) * 2
    return (out_struct(shape, dtype, *like),)


def carry_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.result_type(dtype, jnp.float32)


def each(planes: tuple[Any, ...], thing: Any) -> tuple[Any, ...]:
    return (thing,) * len(planes)
