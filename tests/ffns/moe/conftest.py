"""A router ready to run, and its comparison with an oracle. Letters: b batch, t time, d model width, x experts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.ffns.base import Pass
from hybridlm.ffns.moe.routers import ROUTERS
from hybridlm.ffns.moe.routing import Tokens
from hybridlm.mixers.base import Context

WIDTH = 20
CONTEXT = Context(width=WIDTH, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-3  # float32 against float64, and against differences of float64

Oracle = Callable[..., tuple[np.ndarray, dict[str, float]]]
"""(params, x [n, d], real [n]) in float64 -> the weight of each expert [n, x], and losses."""


def run(graphdef: Any, params: Any, shared: Any, x: Any, real: Any, told: dict[str, Any], carry: Any) -> Any:
    batch, length, width = x.shape
    given = Pass(shared=shared, **told)
    tokens = Tokens(x.reshape(-1, width), real.reshape(-1), length)
    return nnx.merge(graphdef, params)(tokens, carry, given)


@dataclass(frozen=True)
class Built:
    """A router of random parameters, called on x [b, t, d]."""

    cfg: config.Router
    num_experts: int
    graphdef: Any
    params: dict[str, Any]
    shared: dict[str, Any]
    jitted: Any

    def inputs(
        self,
        x: np.ndarray,
        real: np.ndarray | None = None,
        *,
        key: Any = None,
        step: int | None = None,
        layer: int = 0,
        ids: np.ndarray | None = None,
        carry: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """What `run` takes after the parameters."""
        real = np.ones(x.shape[:2], bool) if real is None else real
        ids = np.zeros(x.shape[:2], np.int32) if ids is None else ids
        told = {"tokens": jnp.asarray(ids), "layer": jnp.int32(layer), "key": key}
        told["step"] = None if step is None else jnp.int32(step)
        carry = self.init_carry(*x.shape[:2]) if carry is None else carry
        return jnp.asarray(x, jnp.float32), jnp.asarray(real), told, carry

    def __call__(self, x: np.ndarray, real: np.ndarray | None = None, *, params: Any = None, **told: Any) -> Any:
        return self.jitted(self.params if params is None else params, self.shared, *self.inputs(x, real, **told))

    def dense(self, routing: Any) -> jax.Array:
        """The weight of every expert [n, x]."""
        return dense(routing, self.num_experts)

    def init_carry(self, batch: int, length: int) -> dict[str, Any]:
        make = getattr(ROUTERS.module_of(self.cfg), "init_carry", None)
        return {} if make is None else make(self.cfg, self.num_experts, CONTEXT, batch, length)


@functools.cache
def definition(cfg: config.Router, num_experts: int) -> tuple[Any, Any, Any, Any]:
    module = ROUTERS.module_of(cfg)
    rngs = nnx.Rngs(params=jax.random.key(0))
    graphdef, state = nnx.split(module(cfg, num_experts, CONTEXT, rngs))
    make = getattr(module, "shared", None)
    shared = {} if make is None else make(cfg, num_experts, CONTEXT, rngs)
    return graphdef, nnx.to_pure_dict(state), shared, jax.jit(functools.partial(run, graphdef))


Build = Callable[..., Built]


@pytest.fixture
def build(rng: np.random.Generator) -> Build:
    """build(cfg, num_experts, scale=...): every parameter is normal with that scale."""

    def built(cfg: config.Router, num_experts: int, scale: float = 0.3) -> Built:
        graphdef, params, shared, jitted = definition(cfg, num_experts)

        def drawn(tree: Any) -> Any:
            return jax.tree.map(lambda a: jnp.asarray(scale * rng.standard_normal(a.shape), jnp.float32), tree)

        return Built(cfg, num_experts, graphdef, drawn(params), drawn(shared), jitted)

    return built


def dense(routing: Any, num_experts: int) -> jax.Array:
    """The weight of every expert [n, x]."""
    rows = jnp.arange(routing.experts.shape[0])[:, None]
    return jnp.zeros((rows.size, num_experts)).at[rows, routing.experts].add(routing.weights, mode="drop")


def assert_agrees(router: Built, oracle: Oracle, rng: np.random.Generator, x: np.ndarray, **told: Any) -> None:
    """Weights and losses equal the oracle's, and gradients the slopes of the oracle along random directions.

    The slopes are of sum_ne w_ne c_ne plus all losses, c random.
    """
    real = told.pop("real", np.ones(x.shape[:2], bool))
    routing, losses, _ = router(x, real, **told)
    params64, x64 = jax.tree.map(lambda a: np.asarray(a, np.float64), (router.params, x.reshape(-1, x.shape[-1])))
    expected, expected_losses = oracle(params64, x64, real.reshape(-1))
    np.testing.assert_allclose(dense(routing, router.num_experts), expected, atol=VALUE_TOLERANCE)
    assert losses.keys() == expected_losses.keys()
    for name, value in expected_losses.items():
        np.testing.assert_allclose(losses[name], value, rtol=1e-4, atol=1e-7, err_msg=name)

    cotangent = rng.standard_normal(expected.shape)

    def objective(params: Any, x: jax.Array) -> jax.Array:
        _, real_, told_, carry = router.inputs(np.asarray(x0), real, **told)
        routing, losses, _ = run(router.graphdef, params, router.shared, x, real_, told_, carry)
        return jnp.sum(dense(routing, router.num_experts) * cotangent) + 100.0 * sum(losses.values())

    def slope(direction: Any, eps: float = 1e-6) -> float:
        def at(sign: int) -> float:
            params, x = jax.tree.map(lambda a, v: a + sign * eps * v, (params64, x64), direction)
            weights, losses = oracle(params, x, real.reshape(-1))
            return float(np.sum(weights * cotangent) + 100.0 * sum(losses.values()))

        return (at(1) - at(-1)) / (2 * eps)

    x0 = np.asarray(x, np.float32)
    d_params, d_x = jax.jit(jax.grad(objective, argnums=(0, 1)))(router.params, jnp.asarray(x0))
    gradient = d_params, d_x.reshape(x64.shape)
    for _ in range(3):
        direction = jax.tree.map(lambda a: rng.standard_normal(a.shape), (params64, x64))
        if "balance_bias" in params64:
            direction[0]["balance_bias"][:] = 0.0  # its gradient is no derivative
        got = sum(
            jax.tree.leaves(jax.tree.map(lambda g, v: float(np.sum(np.asarray(g, float) * v)), gradient, direction))
        )
        size = np.sqrt(sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(gradient)))
        assert abs(got - slope(direction)) <= GRADIENT_TOLERANCE * size, (got, slope(direction))


@pytest.fixture
def agrees(rng: np.random.Generator) -> Callable[..., None]:
    """`assert_agrees(router, oracle, x, ...)`."""

    def compare(router: Built, oracle: Oracle, x: np.ndarray, **told: Any) -> None:
        assert_agrees(router, oracle, rng, x, **told)

    return compare
