"""Outputs and gradients in float64, token by token in NumPy, written without sight of the kernels.

Letters: b batch, t time, d channels, w taps, h heads, k key dim, v value dim. Of
`grouped_matmul`: m rows, k inputs, n outputs, g groups.
"""

from typing import Any

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


def grouped_matmul(x: Array, w: Array, sizes: Array, dy: Array) -> tuple[Array, tuple[Array, Array]]:
    """y_i = x_i w[j], row i of the rows sorted by group being of group j: y and (dx, dw). x [m, k], w [g, k, n]"""
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for i, j in enumerate(np.repeat(np.arange(len(w)), sizes)):
        y[i], dx[i] = x[i] @ w[j], w[j] @ dy[i]
        dw[j] += np.outer(x[i], dy[i])
    return y, (dx, dw)


def gated_linear_attention(
    q: Array, k: Array, v: Array, log_decay: Array, do: Array
) -> tuple[Array, tuple[Array, ...]]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = k^-1/2 S_t^T q_t from a zero state: o and (dq, dk, dv, dg).

    q, k [b, t, h, k], v [b, t, h, v], g [b, t, h] or [b, t, h, k].
    """
    o, (dq, dk, dv, _, dg) = _by_token(q, k, v, None, log_decay, do)
    return o, (dq, dk, dv, dg)


def gated_delta_rule(
    q: Array, k: Array, v: Array, beta: Array, log_decay: Array, do: Array
) -> tuple[Array, tuple[Array, ...]]:
    """S = Diag(exp g_t) S_{t-1}, S_t = S + beta_t k_t (v_t - S^T k_t)^T, o_t = k^-1/2 S_t^T q_t: o, (dq, ..., dg)."""
    return _by_token(q, k, v, beta, log_decay, do)


def _by_token(q: Array, k: Array, v: Array, beta: Array | None, g: Array, do: Array) -> tuple[Array, tuple[Any, ...]]:
    state = np.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    q, k, v, g, do = (np.swapaxes(x, 1, 2) for x in (q, k, v, g, do))
    beta = None if beta is None else np.swapaxes(beta, 1, 2)
    o, _, *gradients, _ = linear_attention(q, k, v, beta, g, state, do, state, q.shape[-1] ** -0.5)
    return np.swapaxes(o, 1, 2), tuple(x if x is None else np.swapaxes(x, 1, 2) for x in gradients)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    beta: Array | None,
    g: Array,
    s0: Array,
    do: Array,
    ds_last: Array,
    scale: float,
) -> tuple[Any, ...]:
    """Both operations, states and heads of a group included: o, the last state, dq, dk, dv, dbeta, dg and ds0.

    q, k [b, h, t, k]; v, do [b, h r, t, v]; beta [b, h r, t], or None without erasing, and dbeta then is; g [b, h r, t]
    or [b, h r, t, k]; s0, ds_last [b, h r, k, v].
    """
    group = v.shape[1] // q.shape[1]
    queries, keys = (np.repeat(x, group, axis=1) for x in (q, k))
    decay = np.broadcast_to(np.exp(g if g.ndim == 4 else g[..., None]), keys.shape)[..., None]  # b h t k 1
    writes = np.ones(v.shape[:3]) if beta is None else beta
    erases = np.zeros(v.shape[:3]) if beta is None else beta
    o, state, kept, written = np.zeros_like(v), s0, [], []
    for t in range(v.shape[2]):
        state = decay[:, :, t] * state
        kept.append(state)
        written.append(writes[:, :, t, None] * v[:, :, t] - erases[:, :, t, None] * _read(keys[:, :, t], state))
        state = state + _outer(keys[:, :, t], written[t])
        o[:, :, t] = scale * _read(queries[:, :, t], state)
    dq, dk, dv, dg, dbeta = (np.zeros_like(x) for x in (queries, keys, v, keys, writes))
    slope = ds_last
    for t in reversed(range(v.shape[2])):
        before = kept[t]
        after = before + _outer(keys[:, :, t], written[t])
        dq[:, :, t] = scale * np.einsum("bhkv,bhv->bhk", after, do[:, :, t])
        slope = slope + scale * _outer(queries[:, :, t], do[:, :, t])
        du = _read(keys[:, :, t], slope)
        dv[:, :, t] = writes[:, :, t, None] * du
        dbeta[:, :, t] = (du * (v[:, :, t] - _read(keys[:, :, t], before))).sum(-1)
        erased = erases[:, :, t, None] * du
        dk[:, :, t] = np.einsum("bhkv,bhv->bhk", slope, written[t]) - np.einsum("bhkv,bhv->bhk", before, erased)
        slope = slope - _outer(keys[:, :, t], erased)
        dg[:, :, t] = (slope * before).sum(-1)
        slope = decay[:, :, t] * slope
    dq, dk = (x.reshape(*q.shape[:2], group, *q.shape[2:]).sum(2) for x in (dq, dk))
    return o, state, dq, dk, dv, None if beta is None else dbeta, dg if g.ndim == 4 else dg.sum(-1), slope


def memory_lookup(table: Array, indices: Array, weights: Array, dy: Array) -> tuple[Array, tuple[Array, Array]]:
    """y_t = sum_k w_tk table[i_tk], token by token, rows outside the table left out: y and (dtable, dweights).

    table [n, ...], indices and weights [t, k]
    """
    rows = table.reshape(len(table), -1)
    y, dtable, dweights = np.zeros_like(dy), np.zeros_like(rows), np.zeros_like(weights)
    for t, index in enumerate(indices):
        here = (index >= 0) & (index < len(rows))
        read, weight = rows[index[here]], weights[t, here]
        y[t], dweights[t, here] = weight @ read, read @ dy[t]
        np.add.at(dtable, index[here], np.outer(weight, dy[t]))
    return y, (dtable.reshape(table.shape), dweights)


def _read(key: Array, state: Array) -> Array:
    return np.einsum("bhk,bhkv->bhv", key, state)


def _outer(key: Array, value: Array) -> Array:
    return key[..., :, None] * value[..., None, :]


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))
