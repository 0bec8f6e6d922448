"""Gates against their equations in float64, and what crosses layers with them.

Letters: b batch, t time, n tokens (b t), d model width, p state width, x experts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.ffns.moe.gates.grkan import b_splines

B, T, D, X = 2, 5, 20, 6


def inputs(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def all_weights(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def dense_router(gate: config.Gate) -> config.TopK:
    """Its weights are the softmax of all logits."""
    return config.TopK(k=X, gate=gate, balance_loss=0.0, z_loss=0.0)


def spline_oracle(x: float, grid_size: int, order: int) -> list[float]:
    """The recursion, one spline at a time."""
    step = 2 / grid_size

    def knot(i: int) -> float:
        return -1 + (i - order) * step

    def value(i: int, p: int) -> float:
        if p == 0:
            return float(knot(i) <= x < knot(i + 1))
        left = (x - knot(i)) / (knot(i + p) - knot(i)) * value(i, p - 1)
        return left + (knot(i + p + 1) - x) / (knot(i + p + 1) - knot(i + 1)) * value(i + 1, p - 1)

    return [value(i, order) for i in range(grid_size + order)]


@pytest.mark.parametrize(("grid_size", "order"), [(5, 3), (4, 1), (3, 2), (1, 3)])
def test_splines_are_those_of_the_recursion(grid_size: int, order: int, rng: np.random.Generator) -> None:
    x = rng.uniform(-2.5, 2.5, 40)
    got = b_splines(jnp.asarray(x, jnp.float32), grid_size, order)
    np.testing.assert_allclose(got, [spline_oracle(a, grid_size, order) for a in x], atol=2e-5)
    inside = np.abs(x) < 1
    np.testing.assert_allclose(np.sum(got, axis=1)[inside], 1.0, rtol=1e-5)


def kan_oracle(params: Any, x: np.ndarray, grid_size: int, order: int) -> np.ndarray:
    y = np.zeros((len(x), params["w_base"].shape[1]))
    for n, row in enumerate(x):
        for i, a in enumerate(row):
            y[n] += a * sigmoid(a) * params["w_base"][i]
            y[n] += np.array(spline_oracle(a, grid_size, order)) @ params["w_spline"][i]
    return y


@pytest.mark.parametrize(("grid_size", "order"), [(5, 3), (3, 2)])
def test_grkan_is_its_equations(build: Any, agrees: Any, grid_size: int, order: int, rng: np.random.Generator) -> None:
    cfg = config.GRKANGate(hidden=4, grid_size=grid_size, spline_order=order)

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        gate = params["gate"]
        e2 = kan_oracle(gate["first"], np.where(x > 0, x, np.expm1(np.minimum(x, 0))), grid_size, order)
        e1 = kan_oracle(gate["second"], e2 * sigmoid(e2), grid_size, order)
        y = x + sigmoid(e1 @ gate["w_gate"]) * (e1 @ gate["w_value"])
        mean, variance = y.mean(axis=1, keepdims=True), y.var(axis=1, keepdims=True)
        normed = (y - mean) / np.sqrt(variance + 1e-6) * (1 + gate["scale"]) + gate["shift"]
        return all_weights(normed @ gate["w_out"]), {}

    agrees(build(dense_router(cfg), X), oracle, inputs(rng)[:, :3])


def gru_oracle(params: Any, u: np.ndarray, h: np.ndarray) -> np.ndarray:
    a = np.split(u @ params["w_input"] + params["b_input"], 3, axis=1)
    b = np.split(h @ params["w_state"] + params["b_state"], 3, axis=1)
    reset, update = sigmoid(a[0] + b[0]), sigmoid(a[1] + b[1])
    return (1 - update) * np.tanh(a[2] + reset * b[2]) + update * h


def shared_gru(router: Any) -> dict[str, np.ndarray]:
    gru = router.shared["router_gru_12"]
    return {
        name: np.asarray(getattr(gru, name)[...], np.float64) for name in ("w_input", "b_input", "w_state", "b_state")
    }


def test_a_recurrent_gate_is_its_equations(build: Any, agrees: Any, rng: np.random.Generator) -> None:
    router = build(dense_router(config.RecurrentGate(state_dim=12)), X)
    before = rng.standard_normal((B, T, 12)).astype(np.float32)

    def oracle(params: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        gate = params["gate"]
        h = gru_oracle(shared_gru(router), x @ gate["w_in"], before.reshape(-1, 12).astype(np.float64))
        return all_weights(h @ gate["w_out"]), {}

    carry = {"router_state_12": jnp.asarray(before)}
    agrees(router, oracle, inputs(rng), carry=carry)


def test_the_state_of_a_recurrent_gate_crosses_layers(build: Any, rng: np.random.Generator) -> None:
    """Three layers against a loop; and the first layer's weights get a gradient from the last one's choice."""
    layers = [build(dense_router(config.RecurrentGate(state_dim=12)), X) for _ in range(3)]
    layers = [layers[0], *(type(layers[0])(**(vars(r) | {"shared": layers[0].shared})) for r in layers[1:])]
    x = [inputs(rng) for _ in layers]
    gru, h, carry = shared_gru(layers[0]), np.zeros((B * T, 12)), layers[0].init_carry(B, T)
    for router, tokens in zip(layers, x, strict=True):
        routing, _, carry = router(tokens, carry=carry)
        gate = jax.tree.map(lambda a: np.asarray(a, np.float64), router.params["gate"])
        h = gru_oracle(gru, tokens.reshape(-1, D) @ gate["w_in"], h)
        np.testing.assert_allclose(carry["router_state_12"].reshape(-1, 12), h, atol=1e-5)
        np.testing.assert_allclose(router.dense(routing), all_weights(h @ gate["w_out"]), atol=1e-5)

    def last_choice(first_params: Any) -> jax.Array:
        carry = layers[0].init_carry(B, T)
        for router, tokens in zip(layers, x, strict=True):
            routing, _, carry = router(tokens, params=first_params if router is layers[0] else None, carry=carry)
        return jnp.sum(jnp.square(router.dense(routing)))

    gradient = jax.grad(last_choice)(layers[0].params)["gate"]
    assert float(jnp.max(jnp.abs(gradient["w_in"]))) > 1e-6
    np.testing.assert_array_equal(gradient["w_out"], 0.0)  # read by the first layer alone


def test_gates_of_different_widths_have_different_states(build: Any) -> None:
    wide, narrow = (build(dense_router(config.RecurrentGate(state_dim=p)), X) for p in (12, 5))
    carry = wide.init_carry(B, T) | narrow.init_carry(B, T)
    assert {name: h.shape for name, h in carry.items()} == {"router_state_12": (B, T, 12), "router_state_5": (B, T, 5)}
    assert set(wide.shared) == {"router_gru_12"} and set(narrow.shared) == {"router_gru_5"}


def test_logits_are_float32_whatever_the_activations_are(build: Any, rng: np.random.Generator) -> None:
    """A token that is exact in bfloat16 is routed as in float32."""
    x = jnp.asarray(inputs(rng), jnp.bfloat16)
    for gate in (config.LinearGate(), config.GRKANGate(hidden=4), config.RecurrentGate(state_dim=12)):
        router = build(dense_router(gate), X)
        _, real, told, carry = router.inputs(np.asarray(x, np.float32))
        got, _, _ = router.jitted(router.params, router.shared, x, real, told, carry)
        expected, _, _ = router.jitted(router.params, router.shared, x.astype(jnp.float32), real, told, carry)
        assert got.weights.dtype == jnp.float32
        np.testing.assert_array_equal(got.weights, expected.weights)
