"""RG-LRU with its gates on Hopper GPUs (De et al. 2024, arXiv:2402.19427). Letters: b batch, t time, d channels.

The gates' elementwise maths lives in registers, forward and backward: of [b, t, d] arrays only operands and results
touch memory. The adjoint recomputes the gates from x, gate_a and gate_x, and reads h in place of scanning again. Where
b and d alone leave most of the GPU idle, time is split into chunks as in `linear_scan.pallas_gpu`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from hybridlm_kernels.gpu_scan import (
    Plan,
    Rows,
    Stream,
    Token,
    fold,
    identity_and_zero,
    plan,
    reciprocal,
    scan,
    unsupported,
)
from hybridlm_kernels.segments import CONTINUE, PADDING, RESET

STEEPEST_ROOT = 1e3  # bound of the derivative of sqrt, which is infinite at 0, where a = 1


def supports(
    x: Array | jax.ShapeDtypeStruct,
    gate_a: Array | jax.ShapeDtypeStruct,
    gate_x: Array | jax.ShapeDtypeStruct,
    *,
    compute_capability: float | None,
) -> str | None:
    """Why the operands [b, t, d] cannot be served on a device of this compute capability, or None."""
    return unsupported([x, gate_a, gate_x], compute_capability)


@dataclasses.dataclass(frozen=True)
class Gates:
    """The gates of one token: log a = -rate recurrence, gain = sqrt(1 - a^2) and the derivative of that root."""

    recurrence: Array
    input: Array
    decay: Array
    gain: Array
    root_slope: Array


def sigmoids(x: Array, y: Array) -> tuple[Array, Array]:
    """1 / (1 + exp(-x)) and 1 / (1 + exp(-y)) from one reciprocal: special functions run at a quarter of the speed."""
    # Beyond -40 the sigmoid stays at 4e-18, so that the product of the denominators is finite.
    p, q = 1.0 + jnp.exp(jnp.minimum(-x, 40.0)), 1.0 + jnp.exp(jnp.minimum(-y, 40.0))
    inverse = reciprocal(p * q)
    return q * inverse, p * inverse


def minus_expm1(z: Array, exp_z: Array) -> Array:
    """1 - exp(z) for z <= 0: a series near 0, where the difference cancels, cut off at 4e-8 of the result."""
    series = 1.0 / 5040.0
    for coefficient in (1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0):
        series = coefficient + z * series
    return jnp.where(z > -0.4, -z * series, 1.0 - exp_z)


def gates_of(gate_a: Array, gate_x: Array, rate: Array) -> Gates:
    recurrence, gate = sigmoids(gate_a, gate_x)
    log_decay = -rate * recurrence
    decay = jnp.exp(log_decay)
    power = minus_expm1(2.0 * log_decay, decay * decay)
    inverse_root = lax.rsqrt(jnp.maximum(power, 1e-37))  # finite at 0, so that the gain there is 0 and not NaN
    return Gates(recurrence, gate, decay, power * inverse_root, jnp.minimum(0.5 * inverse_root, STEEPEST_ROOT))


def select(kind: Array | None, going_on: Array, reset: Array | float, padding: Array | float) -> Array:
    if kind is None:
        return going_on
    return jnp.where(kind == CONTINUE, going_on, jnp.where(kind == RESET, reset, padding))


def decay_and_input(rows: Rows, rate: Array, kind: Array | None) -> tuple[Array, Array]:
    """The token's effective decay and what it adds to the state."""
    x, gate_a, gate_x = (row.astype(jnp.float32) for row in rows)
    gates = gates_of(gate_a, gate_x, rate)
    gated = gates.input * x
    return select(kind, gates.decay, 0.0, 1.0), select(kind, gates.gain * gated, gated, 0.0)


def forward(x: Array, gate_a: Array, gate_x: Array, rate: Array, h0: Array, kinds: Array | None) -> tuple[Array, Array]:
    """h [b, t, d] in the dtype of x, and the last state [b, d] float32."""
    division = plan(x.shape, _width(x, gate_a, gate_x, x))

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay, added = decay_and_input(rows, constants[0], kind)
            h = decay * carries[0] + added
            return (h,), (h,)

        return step

    chunks = None if division.num_chunks == 1 else _summaries(x, gate_a, gate_x, rate, kinds, division)
    streams = [Stream(x), Stream(gate_a), Stream(gate_x)]
    (h,), (last,) = scan(
        "rg_lru_forward", token, streams, kinds, [h0], [rate], [x.dtype], division, reverse=False, summary=chunks
    )
    return h, last[:, -1]


def adjoint(
    x: Array,
    gate_a: Array,
    gate_x: Array,
    rate: Array,
    h: Array,
    h0: Array,
    dh: Array,
    dh_last: Array,
    kinds: Array | None,
) -> tuple[Array, Array, Array, Array, Array]:
    """dx, dgate_a, dgate_x [b, t, d], drate [d] and dh0 [b, d]."""
    division = plan(x.shape, _width(x, gate_a, gate_x, h, dh, x, gate_a, gate_x))

    def token(constants: Rows) -> Token:
        (rate,) = constants

        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            x, gate_a, gate_x, h_before, dh = (row.astype(jnp.float32) for row in rows)
            gates = gates_of(gate_a, gate_x, rate)
            gate = gates.input
            u = dh + carries[0]
            dgated = select(kind, u * gates.gain, u, 0.0)  # of gate x
            dgain = u * gate * x
            da = u * h_before
            # gain = sqrt(y) with y = 1 - exp(2 log a), so dy / dlog a = -2 a^2
            slope = gates.decay * (da - 2.0 * gates.decay * gates.root_slope * dgain)
            drecurrence = select(kind, slope * gates.recurrence, 0.0, 0.0)  # dlog a times the gate
            dgate_a = -rate * drecurrence * (1.0 - gates.recurrence)
            dx = dgated * gate
            gated_slope = x * (1.0 - gate)
            dgate_x = dx * gated_slope if kind is None else jnp.where(kind == PADDING, 0.0, dx * gated_slope)
            carry = select(kind, gates.decay * u, 0.0, u)
            return (carry, carries[1] - drecurrence), (dx, dgate_a, dgate_x)

        return step

    chunks = None if division.num_chunks == 1 else _adjoint_summaries(gate_a, rate, dh, kinds, division)
    (dx, dgate_a, dgate_x), (last, drate) = scan(
        "rg_lru_adjoint",
        token,
        [Stream(x), Stream(gate_a), Stream(gate_x), Stream(h, -1, h0[:, None]), Stream(dh)],
        kinds,
        [dh_last, jnp.zeros_like(rate)],
        [rate],
        [x.dtype, gate_a.dtype, gate_x.dtype],
        division,
        reverse=True,
        summary=chunks,
    )
    return dx, dgate_a, dgate_x, drate.sum((0, 1)), last[:, -1]


def summary(x: Array, gate_a: Array, gate_x: Array, rate: Array, kinds: Array | None) -> tuple[Array, Array]:
    """The product of all decays and the state after the last token from a zero state, each [b, d] float32."""
    division = plan(x.shape, _width(x, gate_a, gate_x), splits_cost=False)
    return fold(*_summaries(x, gate_a, gate_x, rate, kinds, division))


def adjoint_summary(gate_a: Array, rate: Array, dh: Array, kinds: Array | None) -> tuple[Array, Array]:
    """The same of the adjoint's carry c -> a_t (dh_t + c), which runs backwards in time from zero."""
    division = plan(dh.shape, _width(gate_a, dh), splits_cost=False)
    return fold(*_adjoint_summaries(gate_a, rate, dh, kinds, division))


def _summaries(
    x: Array, gate_a: Array, gate_x: Array, rate: Array, kinds: Array | None, division: Plan
) -> tuple[Array, Array]:
    """`summary` of every chunk, each [b, n, d]."""

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            decay, added = decay_and_input(rows, constants[0], kind)
            return (decay * carries[0], decay * carries[1] + added), ()

        return step

    streams = [Stream(x), Stream(gate_a), Stream(gate_x)]
    _, (decay, added) = scan(
        "rg_lru_summary", token, streams, kinds, identity_and_zero(division), [rate], [], division, reverse=False
    )
    return decay, added


def _adjoint_summaries(
    gate_a: Array, rate: Array, dh: Array, kinds: Array | None, division: Plan
) -> tuple[Array, Array]:
    """`adjoint_summary` of every chunk, each [b, n, d], the last chunk of time first."""

    def token(constants: Rows) -> Token:
        def step(carries: Rows, kind: Array | None, rows: Rows) -> tuple[Rows, Rows]:
            gate_a = rows[0].astype(jnp.float32)
            decay = select(kind, gates_of(gate_a, gate_a, constants[0]).decay, 0.0, 1.0)
            return (decay * carries[0], decay * (rows[1].astype(jnp.float32) + carries[1])), ()

        return step

    _, (decay, added) = scan(
        "rg_lru_adjoint_summary",
        token,
        [Stream(gate_a), Stream(dh)],
        kinds,
        identity_and_zero(division),
        [rate],
        [],
        division,
        reverse=True,
    )
    return decay, added


def _width(*arrays: Array) -> int:
    return sum(array.dtype.itemsize for array in arrays)
