"""The fused RG-LRU as Pallas kernels for TPU. Letters: b batch, t time, d channels.

log a_t = -rate sigmoid(gate_a_t), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(gate_x_t) x_t (De et al. 2024,
arXiv:2402.19427, section 2.4). Decay and input exist in VMEM alone, forward and backward: the adjoint computes them
again from x and the gates. Blocks, rows and masks as in tpu_scan.py.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from hybridlm_kernels import tpu_scan
from hybridlm_kernels.jax_compat import out_struct
from hybridlm_kernels.planes import Planes
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET
from hybridlm_kernels.tpu_scan import ABSENT, Before

DTYPES = ("bfloat16", "float32")
FORGET = -1e4  # a log decay whose exponential is 0
STEEPEST = 2000.0  # largest 1 / sqrt(1 - a^2) in the gradient, which is infinite at a = 1


def supports(x: Any, gate_a: Any, gate_x: Any, *_: Any, **__: Any) -> str | None:
    """Why the kernels cannot serve; None where they can."""
    for operand in (x, gate_a, gate_x):
        if str(operand.dtype) not in DTYPES:
            return f"takes {', '.join(DTYPES)}, not {operand.dtype}"
    return None


@partial(jax.jit, static_argnames="interpret")
def forward(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, h0: Array, kinds: Array | None, *, interpret: Any = False
) -> tuple[Array, Array]:
    """h [b, t, d] in x's dtype and the last state [b, d] float32."""
    like = (x, gate_a, gate_x, rate, h0)
    h_like = out_struct(x.shape, x.dtype, *like)
    state_like = out_struct((x.shape[0], 1, x.shape[2]), jnp.float32, *like)
    tiles = tpu_scan.tiling((x, gate_a, gate_x, h_like), scratch=2, backward=False)
    kinds = tiles.lay_out(kinds)
    tokens, state = tiles.tokens(), tiles.channels()
    h, last = pl.pallas_call(
        _forward_kernel,
        grid=tiles.grid,
        in_specs=[tokens, tokens, tokens, tiles.weights(), state, tiles.kinds(kinds)],
        out_specs=[tokens, state],
        out_shape=[h_like, state_like],
        scratch_shapes=[*tiles.groups(2), *tiles.carries(1), tiles.spread(kinds)],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="rg_lru",
    )(x, gate_a, gate_x, -rate.astype(jnp.float32)[None], h0.astype(jnp.float32)[:, None], kinds)
    return h, last[:, 0]


def _forward_kernel(
    x: Any, gate_a: Any, gate_x: Any, minus_rate: Any, h0: Any, kinds: Any, h: Any, last: Any,
    decays: Any, values: Any, carry: Any, spread: Any,
) -> None:  # fmt: skip
    tpu_scan.start((carry,), (h0,))
    tpu_scan.spread_kinds(kinds, spread)

    def group(first: Array, slot: int, state: Planes) -> Planes:
        _unpack(x, gate_a, gate_x, minus_rate, first, slot, decays, values, spread)
        state = tpu_scan.scan_rows(tpu_scan.forwards, (decays,), (values,), slot, state, False)
        for at in tpu_scan.lane_slices((h,)):
            tpu_scan.store((h,), first, at, tpu_scan.load((values,), slot, at))
        return state

    tpu_scan.over_groups(x.shape[0], False, group, (carry,))
    tpu_scan.finish((carry,), (last,))


@partial(jax.jit, static_argnames="interpret")
def adjoint(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, h: Array, h0: Array, dh: Array, dh_last: Array,
    kinds: Array | None, *, interpret: Any = False,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """dx, dgate_a, dgate_x [b, t, d], drate [d] float32 and what reaches h0, [b, d] float32."""
    like = (x, gate_a, gate_x, rate, h, h0, dh, dh_last)
    token_likes = [out_struct(x.shape, operand.dtype, *like) for operand in (x, gate_a, gate_x)]
    state_like = out_struct((x.shape[0], 1, x.shape[2]), jnp.float32, *like)
    tiles = tpu_scan.tiling((x, gate_a, gate_x, h, dh, *token_likes), scratch=4, backward=True)
    kinds = tiles.lay_out(kinds)
    tokens, state = tiles.tokens(), tiles.channels()
    dx, dgate_a, dgate_x, drate, dh0 = pl.pallas_call(
        _adjoint_kernel,
        grid=tiles.grid,
        in_specs=[
            tokens, tokens, tokens, tiles.weights(), tokens, tiles.group_before(reverse=False), state, tokens, state,
            tiles.kinds(kinds),
        ],
        out_specs=[tokens, tokens, tokens, state, state],
        out_shape=[*token_likes, state_like, state_like],
        scratch_shapes=[
            *tiles.groups(3), *tiles.halves(2), *tiles.carries(1), tiles.spread(kinds),
        ],
        compiler_params=tiles.params(),
        interpret=interpret,
        name="rg_lru_adjoint",
    )(
        x, gate_a, gate_x, -rate.astype(jnp.float32)[None], h, h, h0.astype(jnp.float32)[:, None], dh,
        dh_last.astype(jnp.float32)[:, None], kinds,
    )  # fmt: skip
    return dx, dgate_a, dgate_x, drate.sum((0, 1)), dh0[:, 0]


def _adjoint_kernel(
    x: Any, gate_a: Any, gate_x: Any, minus_rate: Any, h: Any, passed: Any, h0: Any, dh: Any, dh_last: Any, kinds: Any,
    dx: Any, dgate_a: Any, dgate_x: Any, drate: Any, dh0: Any,
    decays: Any, values: Any, sigmoids: Any, drates: Any, edges: Any, carry: Any, spread: Any,
) -> None:  # fmt: skip
    tpu_scan.start((carry,), (dh_last,))
    tpu_scan.spread_kinds(kinds, spread)
    is_first, is_last = pl.program_id(2) == 0, pl.program_id(2) == pl.num_programs(2) - 1
    before = Before((h,), (passed,), (h0,), (edges,), spread, reverse=False, is_start=is_last)

    @pl.when(is_first)
    def _() -> None:
        drates[...] = jnp.zeros(drates.shape, jnp.float32)

    def group(first: Array, slot: int, state: Planes) -> Planes:
        for at in tpu_scan.lane_slices((x,)):
            kind = tpu_scan.kinds_of(spread, first, at)
            gate, upstream = tpu_scan.load((gate_a, dh), first, at)
            s_a = sigmoid(gate, gate_a)
            tpu_scan.store((sigmoids,), slot, at, (s_a,))
            tpu_scan.store((decays,), slot, at, tpu_scan.kept((jnp.exp(minus_rate[:, at] * s_a),), kind))
            tpu_scan.store((values,), slot, at, tpu_scan.masked((upstream,), kind, ABSENT))
        state = tpu_scan.scan_rows(tpu_scan.adjoint, (decays,), (values,), slot, state, True)
        for at in tpu_scan.lane_slices((x,)):
            kind = tpu_scan.kinds_of(spread, first, at)
            u, a, s_a = tpu_scan.load((values, decays, sigmoids), slot, at)
            value, gate = tpu_scan.load((x, gate_x), first, at)
            (previous,) = before(first, at)
            s_x = sigmoid(gate, gate_x)
            gain, slope = gain_and_slope(minus_rate[:, at] * s_a, a)
            gain = gain if kind is None else jnp.where(kind == RESET, 1.0, gain)
            through_gate = u * s_x
            d_value, d_gate = through_gate * gain, through_gate * (1.0 - s_x) * gain * value
            d_log = u * previous * a + through_gate * value * slope
            through_a = s_a * d_log
            d_decay_gate = minus_rate[:, at] * (1.0 - s_a) * through_a
            tpu_scan.store((dx, dgate_x), first, at, tpu_scan.masked((d_value, d_gate), kind, PADDING))
            d_decay_gate, through_a = tpu_scan.masked((d_decay_gate, through_a), kind, RESET)
            tpu_scan.store((dgate_a,), first, at, (d_decay_gate,))
            drates[:, at] -= through_a[:8] + through_a[8:]
        return state

    tpu_scan.over_groups(x.shape[0], True, group, (carry,))
    tpu_scan.finish((carry,), (dh0,))

    @pl.when(is_last)
    def _() -> None:
        drate[...] = jnp.sum(drates[...], axis=0, keepdims=True)


@partial(jax.jit, static_argnames="interpret")
def summary(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, kinds: Array | None, *, interpret: Any = False
) -> tuple[Array, Array]:
    """What all of time does to a state s: s -> decay s + added, both [b, d] float32."""
    return _summary(_summary_kernel, (x, gate_a, gate_x), rate, kinds, False, interpret)


@partial(jax.jit, static_argnames="interpret")
def adjoint_summary(
    gate_a: Array, rate: Array, dh: Array, kinds: Array | None, *, interpret: Any = False
) -> tuple[Array, Array]:
    """The same of the adjoint's carry c <- a_t (c + dh_t), against time."""
    return _summary(_adjoint_summary_kernel, (gate_a, dh), rate, kinds, True, interpret)


def _summary(
    kernel: Any, operands: tuple[Array, ...], rate: Array, kinds: Array | None, backward: bool, interpret: Any
) -> tuple[Array, Array]:
    b, _, d = operands[0].shape
    state_like = out_struct((b, 1, d), jnp.float32, *operands, rate)
    tiles = tpu_scan.tiling(operands, scratch=2, backward=backward)
    kinds = tiles.lay_out(kinds)
    decay, added = pl.pallas_call(
        kernel,
        grid=tiles.grid,
        in_specs=[(tiles.tokens(),) * len(operands), tiles.weights(), tiles.kinds(kinds)],
        out_specs=[tiles.channels()] * 2,
        out_shape=[state_like] * 2,
        scratch_shapes=[*tiles.groups(2), tiles.spread(kinds)],
        compiler_params=tiles.params(),
        interpret=interpret,
        name=kernel.__name__.strip("_").replace("summary_kernel", "rg_lru_summary"),
    )(operands, -rate.astype(jnp.float32)[None], kinds)
    return decay[:, 0], added[:, 0]


def _summary_kernel(
    operands: Any, minus_rate: Any, kinds: Any, decay: Any, added: Any, decays: Any, values: Any, spread: Any
) -> None:
    tpu_scan.start_summary((decay,), (added,))
    tpu_scan.spread_kinds(kinds, spread)
    step = tpu_scan.total(tpu_scan.forwards, 1)
    x, gate_a, gate_x = operands

    def group(first: Array, slot: int, carry: Planes) -> Planes:
        _unpack(x, gate_a, gate_x, minus_rate, first, slot, decays, values, spread)
        return tpu_scan.scan_rows(step, (decays,), (values,), slot, carry, False)

    tpu_scan.over_groups(x.shape[0], False, group, (decay, added))


def _adjoint_summary_kernel(
    operands: Any, minus_rate: Any, kinds: Any, decay: Any, added: Any, decays: Any, values: Any, spread: Any
) -> None:
    tpu_scan.start_summary((decay,), (added,))
    tpu_scan.spread_kinds(kinds, spread)
    step = tpu_scan.total(tpu_scan.adjoint, 1)

    def group(first: Array, slot: int, carry: Planes) -> Planes:
        for at in tpu_scan.lane_slices(operands):
            kind = tpu_scan.kinds_of(spread, first, at)
            gate, upstream = tpu_scan.load(operands, first, at)
            a = jnp.exp(minus_rate[:, at] * sigmoid(gate, operands[0]))
            tpu_scan.store((decays,), slot, at, tpu_scan.kept((a,), kind))
            tpu_scan.store((values,), slot, at, tpu_scan.masked((upstream,), kind, ABSENT))
        return tpu_scan.scan_rows(step, (decays,), (values,), slot, carry, True)

    tpu_scan.over_groups(operands[0].shape[0], True, group, (decay, added))


def _unpack(
    x: Any, gate_a: Any, gate_x: Any, minus_rate: Any, first: Array, slot: int, decays: Any, values: Any, spread: Any
) -> None:
    """Decays and inputs of the recurrence for the group at row `first`."""
    for at in tpu_scan.lane_slices((x,)):
        kind = tpu_scan.kinds_of(spread, first, at)
        value, decay_gate, input_gate = tpu_scan.load((x, gate_a, gate_x), first, at)
        log_a = minus_rate[:, at] * sigmoid(decay_gate, gate_a)
        if kind is not None:  # one select makes a = 0 and gain = 1, or a = 1 at padding
            log_a = jnp.where(kind == CONTINUE, log_a, jnp.where(kind == RESET, FORGET, 0.0))
        a = jnp.exp(log_a)
        gain, _ = gain_and_slope(log_a, a)
        value = gain * sigmoid(input_gate, gate_x) * value
        tpu_scan.store((decays,), slot, at, (a,))
        tpu_scan.store((values,), slot, at, tpu_scan.masked((value,), kind, PADDING))


def sigmoid(gate: Array, stored: Any) -> Array:
    """Through tanh, a third of the work, where the gate is `stored` in bfloat16.

    Its error of 1e-7 is then less than what rounding the gate does to the sigmoid, however small that is.
    """
    return 0.5 * jnp.tanh(0.5 * gate) + 0.5 if stored.dtype == jnp.bfloat16 else jax.nn.sigmoid(gate)


def gain_and_slope(log_a: Array, a: Array) -> tuple[Array, Array]:
    """sqrt(1 - a^2) and its derivative by log a, bounded."""
    square = a * a
    # 1 - a^2 loses its digits as a -> 1; the series is exact to 2e-7 of its value where log a > -1/32.
    series = log_a * (-2.0 + log_a * (-2.0 + log_a * (-4 / 3 + log_a * (-2 / 3))))
    rest = jnp.where(log_a > -1 / 32, series, 1.0 - square)
    inverse_root = jax.lax.rsqrt(jnp.maximum(rest, 1e-36))  # finite at a = 1
    return rest * inverse_root, -square * jnp.minimum(inverse_root, STEEPEST)
