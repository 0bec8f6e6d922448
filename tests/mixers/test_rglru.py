"""Griffin's recurrent block against a token-by-token float64 oracle, and the statistics of its decays.

De et al., 2024, arXiv:2402.19427, sections 2.3 and 2.4, appendix A.

Letters: b batch, t time, d model width, e recurrence width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.mixers.base import Context, Segments
from hybridlm.mixers.rglru import RGLRU
from hybridlm.sharding import make_mesh

B, T, D = 2, 9, 10
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
IDS = np.array([[1] * 3 + [2] * 6, [3] * 1 + [4] * 5 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(3), *range(6)], [0, *range(5), *range(3)]], np.int32)

configs = pytest.mark.parametrize(
    "cfg",
    [
        config.RGLRU(width=15, num_heads=3),
        config.RGLRU(width=14, num_heads=1, init="recurrentgemma", bias=True, conv_width=2),
    ],
    ids=["paper", "recurrentgemma"],
)


def block_oracle(p: Any, x: Any, ids: Any, num_heads: int, conv_width: int, xp: Any) -> Any:
    """y [b t d] in float64, zero at padding; `xp` is numpy or jax.numpy.

    y_t = (gelu(x_t W_y + b_y) * h_t) W_o + b_o,  u_t = b_c + sum_j w_c[W-1-j] (x_{t-j} W_x + b_x) in the document,
    r_t = sigmoid(u_t W_a + b_a), i_t = sigmoid(u_t W_i + b_i) per head, a_t = exp(-8 softplus(L) r_t),
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t, and h_t = i_t u_t at a document's first token.
    """

    def sigmoid(z: Any) -> Any:
        return 1 / (1 + xp.exp(-z))

    def linear(z: Any, layer: Any) -> Any:
        return z @ layer["w"] + layer.get("b", 0.0)

    def gate(u: Any, w: Any, bias: Any) -> Any:
        return xp.concatenate([part @ w[h] + bias[h] for h, part in enumerate(xp.split(u, num_heads))])

    rows = []
    for row in range(x.shape[0]):
        outputs, held, h, last = [], [], 0.0, 0
        for t in range(x.shape[1]):
            if ids[row, t] == 0:
                outputs.append(xp.zeros(x.shape[2]))
                continue
            first = ids[row, t] != last
            last = ids[row, t]
            held = [linear(x[row, t], p["in_x"])] + ([] if first else held)
            u = p["b_conv"] + sum(p["w_conv"][-1 - j] * v for j, v in enumerate(held[:conv_width]))
            r, i = sigmoid(gate(u, p["w_gate_a"], p["b_gate_a"])), sigmoid(gate(u, p["w_gate_x"], p["b_gate_x"]))
            a = xp.exp(-8 * xp.log(1 + xp.exp(p["decay"])) * r)
            h = i * u if first else a * h + xp.sqrt(1 - a**2) * i * u
            z = linear(x[row, t], p["in_y"])
            gelu = 0.5 * z * (1 + xp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            outputs.append(linear(gelu * h, p["out"]))
        rows.append(xp.stack(outputs))
    return xp.stack(rows)


def make(cfg: config.RGLRU, rng: np.random.Generator) -> tuple[Any, Any]:
    """The module's definition and its parameters, all away from their constants, as nested dicts of float32 arrays."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: RGLRU(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0)))))
    params = jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), nnx.to_pure_dict(state))
    params["decay"] = params["decay"] - 3.0  # softplus(L) about 0.05: a about 0.8 at r = 1/2
    return graphdef, params


def bound(graphdef: Any, params: Any, x: Any) -> Any:
    y, _, _ = nnx.merge(graphdef, params)(x, Segments(jnp.asarray(IDS), jnp.asarray(POSITIONS)), None, {})
    return y * (IDS != 0)[:, :, None]


@configs
def test_forward_equals_the_oracle(cfg: config.RGLRU, rng: np.random.Generator) -> None:
    graphdef, params = make(cfg, rng)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    y = jax.jit(lambda p, x: bound(graphdef, p, x))(params, x)
    wide, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    assert distance(y, block_oracle(wide, x, IDS, cfg.num_heads, cfg.conv_width, np)) < FORWARD_TOLERANCE


@configs
def test_gradients_equal_the_oracle(cfg: config.RGLRU, rng: np.random.Generator) -> None:
    graphdef, params = make(cfg, rng)
    x, cotangent = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))

    def objective(p: Any, x: Any) -> Any:
        return jnp.sum(bound(graphdef, p, x) * cotangent)

    def oracle_objective(p: Any, x: Any) -> Any:
        return jnp.sum(block_oracle(p, x, IDS, cfg.num_heads, cfg.conv_width, jnp) * cotangent)

    got = jax.jit(jax.grad(objective, argnums=(0, 1)))(params, x)
    with jax.enable_x64(True):
        wide, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
        # Not jitted: thousands of unrolled operations compile for a minute, and run one by one in seconds.
        want = jax.grad(oracle_objective, argnums=(0, 1))(wide, x)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert b.dtype == np.float64
        assert distance(a, b) < GRADIENT_TOLERANCE, jax.tree_util.keystr(path)


@pytest.mark.parametrize(("init", "low", "high"), [("paper", 0.9, 0.999), ("recurrentgemma", 0.9**8, 0.999**8)])
def test_decays_at_an_open_gate_are_drawn_as_documented(init: str, low: float, high: float) -> None:
    decay = initial_decay(init, 40_000)
    a = np.exp(-8 * np.log1p(np.exp(decay.astype(np.float64))))
    assert decay.dtype == np.float32
    assert low - 1e-4 < a.min() < low + 1e-3 and high - 1e-3 < a.max() < high + 1e-4
    # Uniform in a, or in the squared radius a^(1/4) of a ring: five equal parts hold a fifth each.
    spread = a if init == "paper" else (a ** (1 / 8)) ** 2
    counts, _ = np.histogram(spread, bins=5, range=(spread.min(), spread.max()))
    np.testing.assert_allclose(counts / a.size, 0.2, atol=0.012)  # six standard deviations


def test_sharded_initialisation_gives_the_same_numbers() -> None:
    cfg = config.RGLRU(width=64, num_heads=4)
    context = Context(**{**vars(CONTEXT), "width": 32})

    def draw(key: Any) -> Any:
        return nnx.to_pure_dict(nnx.state(RGLRU(cfg, context, nnx.Rngs(params=key))))

    want = jax.jit(draw)(jax.random.key(3))
    with jax.set_mesh(make_mesh(config.Mesh(data=1, fsdp=2, tensor=4))):
        got = jax.jit(draw)(jax.random.key(3))
    assert got["in_x"]["w"].sharding.shard_shape((32, 64)) == (16, 16)
    # The same random bits; XLA may fuse a logarithm differently: a unit in the last place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


def test_parameters_are_drawn_with_the_published_scales() -> None:
    cfg = config.RGLRU(width=512, num_heads=4, bias=True)
    context = Context(**{**vars(CONTEXT), "width": 256, "num_layers": 8})
    key = jax.random.key(0)
    params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(RGLRU(cfg, context, nnx.Rngs(params=key)))))()
    for name, variance in {"in_x": 1 / 256, "in_y": 1 / 256, "out": 2 / 8 / 512}.items():
        assert np.var(params[name]["w"]) == pytest.approx(variance, rel=0.03)
        assert not np.any(params[name]["b"])
    for name in ("w_gate_a", "w_gate_x"):
        assert np.var(params[name]) == pytest.approx(1 / 128, rel=0.03)
    assert np.var(params["w_conv"]) == pytest.approx(0.01 / 4, rel=0.15)


def test_heads_that_do_not_divide_by_the_mesh_are_an_error() -> None:
    with (
        jax.set_mesh(make_mesh(config.Mesh(data=2, tensor=4))),
        pytest.raises(ConfigError, match="tensor = 4 must divide every 'lru' axis of the model, and one has size 2"),
    ):
        jax.eval_shape(lambda: RGLRU(config.RGLRU(width=24, num_heads=2), CONTEXT, nnx.Rngs(params=jax.random.key(0))))


def initial_decay(init: str, width: int) -> np.ndarray:
    cfg = config.RGLRU(width=width, num_heads=width, init=init)
    key = jax.random.key(11)
    return np.asarray(jax.jit(lambda: RGLRU(cfg, CONTEXT, nnx.Rngs(params=key)).decay[...])())


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
