"""Outputs and gradients in float64, token by token in NumPy, written without sight of the kernels.

Letters: b batch, t time, d channels, w taps.
"""

import numpy as np

Array = np.ndarray


def linear_scan(a: Array, x: Array, dh: Array) -> tuple[Array, tuple[Array, Array]]:
    """h_t = a_t h_{t-1} + x_t from a zero state: h and (da, dx). [b, t, d]"""
    h, u = np.zeros_like(x), np.zeros_like(x)
    state = slope = np.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = h[:, t] = a[:, t] * state + x[:, t]
    for t in reversed(range(x.shape[1])):
        u[:, t] = dh[:, t] + slope
        slope = a[:, t] * u[:, t]
    before = np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
    return h, (u * before, u)


def rg_lru(
    x: Array, gate_a: Array, gate_x: Array, decay: Array, dh: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """De et al. 2024 (arXiv:2402.19427), section 2.4, of one document: h and (dx, dgate_a, dgate_x, ddecay).

    log a_t = -8 softplus(decay) sigmoid(gate_a_t), h_t = a_t h_{t-1} + sqrt(1 - a_t^2) sigmoid(gate_x_t) x_t, the root
    being 1 at the first token.
    """
    rate = 8 * np.logaddexp(0, decay)
    r, i = _sigmoid(gate_a), _sigmoid(gate_x)
    log_a = -rate * r
    a, root = np.exp(log_a), np.sqrt(-np.expm1(2 * log_a))
    later = np.arange(x.shape[1])[:, None] > 0
    gain = np.where(later, root, 1)
    h, (da, db) = linear_scan(a, gain * i * x, dh)
    dlog_a = da * a - later * db * i * x * a**2 / root
    drate = (-dlog_a * r).sum((0, 1))
    return h, (
        db * gain * i,
        -dlog_a * rate * r * (1 - r),
        db * gain * x * i * (1 - i),
        drate * 8 * _sigmoid(decay),
    )


def short_conv(x: Array, w: Array, bias: Array, dy: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    """y_t = silu(bias + sum_j w[W-1-j] x_{t-j}), zeros before token 0: y and (dx, dw, dbias). x [b, t, d], w [w, d]"""
    taps, t = len(w), x.shape[1]
    padded = np.concatenate([np.zeros_like(x[:, : taps - 1]), x], axis=1) if taps > 1 else x
    before = bias + sum(w[k] * padded[:, k : k + t] for k in range(taps))
    gate = _sigmoid(before)
    dbefore = dy * gate * (1 + before * (1 - gate))
    dpadded, dw = np.zeros_like(padded), np.zeros_like(w)
    for k in range(taps):
        dpadded[:, k : k + t] += w[k] * dbefore
        dw[k] = (padded[:, k : k + t] * dbefore).sum((0, 1))
    return before * gate, (dpadded[:, taps - 1 :], dw, dbefore.sum((0, 1)))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
