"""Outputs and gradients in float64, token by token in NumPy, written without sight of the kernels.

Letters: b batch, t time, d channels, w taps, h heads, k key dim, v value dim.
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


def gated_linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array, do: Array
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = k^-1/2 S_t^T q_t: o and (dq, dk, dv, dg).

    q, k [b, t, h, k], v [b, t, h, v], g [b, t, h] or [b, t, h, k].
    """
    zero = np.zeros(q.shape[:3])
    o, (dq, dk, dv, _, dg) = _delta(q, k, v, zero, log_decay, do, writes=np.ones(q.shape[:3]))
    return o, (dq, dk, dv, dg)


def gated_delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, do: Array
) -> tuple[Array, tuple[Array, ...]]:
    """S = Diag(exp g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, o_t = k^-1/2 S_t^T q_t: o, (dq, ..., dg)."""
    return _delta(q, k, v, beta, log_decay, do, writes=beta)


def _delta(
    q: Array, k: Array, v: Array, erases: Array, g: Array, do: Array, writes: Array
) -> tuple[Array, tuple[Array, ...]]:
    """u_t = writes_t v_t - erases_t S^T k_t; the fourth cotangent is that of a number that is both."""
    scale = q.shape[-1] ** -0.5
    per_channel = g.ndim == 4
    decay = np.exp(g) if per_channel else np.broadcast_to(np.exp(g)[..., None], q.shape)
    states, kept, written = [], [], []
    state = np.zeros((*q.shape[::2][:1], *q.shape[2:], v.shape[-1]))  # b h k v
    o = np.zeros_like(v)
    for t in range(q.shape[1]):
        states.append(state)
        state = decay[:, t, :, :, None] * state
        kept.append(state)
        u = writes[:, t, :, None] * v[:, t] - erases[:, t, :, None] * np.einsum("bhkv,bhk->bhv", state, k[:, t])
        written.append(u)
        state = state + k[:, t, :, :, None] * u[:, :, None, :]
        o[:, t] = scale * np.einsum("bhkv,bhk->bhv", state, q[:, t])
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, decay))
    dbeta = np.zeros_like(erases)
    slope = np.zeros_like(state)
    for t in reversed(range(q.shape[1])):
        after = kept[t] + k[:, t, :, :, None] * written[t][:, :, None, :]
        dq[:, t] = scale * np.einsum("bhkv,bhv->bhk", after, do[:, t])
        slope = slope + scale * q[:, t, :, :, None] * do[:, t, :, None, :]
        du = np.einsum("bhkv,bhk->bhv", slope, k[:, t])
        seen = np.einsum("bhkv,bhk->bhv", kept[t], k[:, t])
        dv[:, t] = writes[:, t, :, None] * du
        dbeta[:, t] = (du * (v[:, t] - seen)).sum(-1)
        erased = erases[:, t, :, None] * du
        dk[:, t] = np.einsum("bhkv,bhv->bhk", slope, written[t]) - np.einsum("bhkv,bhv->bhk", kept[t], erased)
        slope = slope - k[:, t, :, :, None] * erased[:, :, None, :]
        dg[:, t] = (slope * states[t]).sum(-1) * decay[:, t]
        slope = decay[:, t, :, :, None] * slope
    return o, (dq, dk, dv, dbeta, dg if per_channel else dg.sum(-1))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
