"""Mixers of the delta rule against a token-by-token float64 oracle, published code, and the statistics of their decays.

Yang et al., 2024 (arXiv:2406.06484, arXiv:2412.06464), Siems et al., 2025 (arXiv:2502.10297), Kimi Linear, 2025
(arXiv:2510.26692).

Letters: b batch, t time, d model width, n steps per token, h query-key heads, r value heads, k key dim, v value dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.mixers import MIXERS
from hybridlm.mixers.base import Context, Segments
from hybridlm.optim import decayed
from hybridlm.sharding import make_mesh

B, T, D = 2, 9, 10
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
IDS = np.array([[1] * 3 + [2] * 6, [3] * 1 + [4] * 5 + [0] * 3], np.int32)
POSITIONS = np.array([[*range(3), *range(6)], [0, *range(5), *range(3)]], np.int32)

CONFIGS = {
    "gated-deltanet": config.GatedDeltaNet(num_heads=2, head_dim=3),
    "gated-deltanet-negative": config.GatedDeltaNet(
        num_heads=1, num_value_heads=3, head_dim=4, value_head_dim=5, allow_neg_eigval=True, output_gate="sigmoid"
    ),
    "gated-deltanet-bare": config.GatedDeltaNet(num_heads=2, head_dim=3, conv_width=None, output_gate=None),
    "deltanet": config.DeltaNet(num_heads=2, head_dim=5),
    "deltanet-negative": config.DeltaNet(
        num_heads=3,
        head_dim=3,
        value_head_dim=2,
        conv_width=None,
        qk_activation=None,
        allow_neg_eigval=True,
        output_gate="silu",
    ),
    "deltanet-sum": config.DeltaNet(
        num_heads=2, head_dim=4, conv_width=2, qk_activation="elu", qk_norm="sum", use_beta=False
    ),
    "deltanet-relu": config.DeltaNet(num_heads=1, head_dim=4, conv_width=3, qk_activation="relu", qk_norm="sum"),
    "delta-product": config.DeltaProduct(num_heads=2, head_dim=3),
    "delta-product-of-3": config.DeltaProduct(
        num_heads=1,
        num_value_heads=2,
        head_dim=4,
        value_head_dim=3,
        num_householder=3,
        use_decay=False,
        allow_neg_eigval=False,
    ),
    "kimi": config.KimiDeltaAttention(num_heads=2, head_dim=3),
    "kimi-bounded": config.KimiDeltaAttention(
        num_heads=1, num_value_heads=3, head_dim=4, value_head_dim=5, decay_lower_bound=-5.0, gate_bias=False
    ),
    "kimi-negative": config.KimiDeltaAttention(num_heads=2, head_dim=3, conv_width=None, allow_neg_eigval=True),
}

FIRST = ("gated-deltanet", "deltanet-negative", "delta-product", "kimi-bounded")  # of each mixer; the others are slow


def oracle(cfg: Any, p: Any, x: Any) -> Any:
    """y [b t d] in float64, zero at padding, one token after another.

    S = Diag(decay) S, for each step S += beta k (v - S^T k)^T, o = S^T q / k^1/2, y = W_o (scale o / rms(o) * gate).
    """
    (heads, value_dim, _), rows = p["w_o"].shape, []
    shape = (heads, cfg.head_dim, value_dim)
    for row in range(x.shape[0]):
        outputs, seen, s, last = [], [], np.zeros(shape), 0
        for t in range(x.shape[1]):
            if IDS[row, t] == 0:
                outputs.append(np.zeros(x.shape[2]))
                continue
            if IDS[row, t] != last:
                seen, s, last = [], np.zeros(shape), IDS[row, t]
            seen = [x[row, t], *seen]  # the newest first
            q, keys, values = queries_keys_values(cfg, p, seen)
            s = decay(cfg, p, x[row, t])[:, :, None] * s
            for key, value, beta in zip(keys, values, betas(cfg, p, x[row, t]), strict=True):
                key = np.repeat(key, heads // key.shape[0], axis=0)
                error = value - np.einsum("rkv,rk->rv", s, key)
                s = s + beta[:, None, None] * key[:, :, None] * error[:, None, :]
            o = np.einsum("rkv,rk->rv", s, np.repeat(q, heads // q.shape[0], axis=0)) / np.sqrt(cfg.head_dim)
            o = o / np.sqrt(np.mean(o**2, axis=1, keepdims=True) + 1e-6) * p["norm"]["scale"]
            outputs.append(np.einsum("rv,rvd->d", o * gate(cfg, p, x[row, t]), p["w_o"]))
        rows.append(np.stack(outputs))
    return np.stack(rows)


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def softplus(z: Any) -> Any:
    return np.log(1 + np.exp(z))


def queries_keys_values(cfg: Any, p: Any, seen: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    """q [h k], and keys [h k] and values [r v] of each step, from the document's tokens, the newest first."""
    activations = {
        "silu": lambda z: z * sigmoid(z),
        "relu": lambda z: np.maximum(z, 0.0),
        "elu": lambda z: np.where(z > 0, z + 1, np.exp(np.minimum(z, 0.0))),
        None: lambda z: z,
    }

    def projected(name: str, activation: str | None) -> Any:
        w, taps = p[name]["w"], p[name].get("conv")
        if taps is None:
            return activations[activation](np.einsum("d,dhk->hk", seen[0], w))
        inputs = [np.einsum("d,dhk->hk", token, w) for token in seen[: taps.shape[0]]]
        return activations[activation](sum(taps[-1 - j] * z for j, z in enumerate(inputs)))

    def normed(z: Any) -> Any:
        if getattr(cfg, "qk_norm", "l2") == "l2":
            return z / np.sqrt(np.sum(z**2, axis=-1, keepdims=True) + 1e-6)
        return z / np.maximum(np.sum(np.abs(z), axis=-1, keepdims=True), 1e-6)

    of_keys, steps = getattr(cfg, "qk_activation", "silu"), getattr(cfg, "num_householder", 1)
    keys, values = projected("k", of_keys), projected("v", "silu")
    return (
        normed(projected("q", of_keys)),
        [normed(key) for key in np.split(keys, steps, axis=1)],
        np.split(values, steps, axis=1),
    )


def betas(cfg: Any, p: Any, token: Any) -> list[Any]:
    """[r] of each step."""
    most = 2.0 if cfg.allow_neg_eigval else 1.0
    if "w_b" not in p:
        return [most * np.ones(cfg.num_heads)]
    b = most * sigmoid(np.einsum("d,d...->...", token, p["w_b"]))
    return [b] if b.ndim == 1 else list(b.T)


def decay(cfg: Any, p: Any, token: Any) -> Any:
    """The factors [r, k or 1] of a token."""
    if isinstance(cfg, config.KimiDeltaAttention):
        f = np.einsum("e,erk->rk", token @ p["w_f1"], p["w_f2"]) + p["dt_bias"]
        rate = np.exp(p["A_log"])[:, None]
        if cfg.decay_lower_bound is None:
            return np.exp(-rate * softplus(f))
        return np.exp(cfg.decay_lower_bound * sigmoid(rate * f))
    if "decay" not in p:
        return np.ones((1, 1))
    z = p["decay"]
    return np.exp(-np.exp(z["A_log"]) * softplus(token @ z["w"] + z["dt_bias"]))[:, None]


def gate(cfg: Any, p: Any, token: Any) -> Any:
    """What the normed output [r v] is multiplied by."""
    if isinstance(cfg, config.KimiDeltaAttention):
        return sigmoid(np.einsum("e,erv->rv", token @ p["w_g1"], p["w_g2"]) + p.get("b_g", 0.0))
    if cfg.output_gate is None:
        return 1.0
    z = np.einsum("d,drv->rv", token, p["g"]["w"])
    return sigmoid(z) * (z if cfg.output_gate == "silu" else 1.0)


def graphdef_and_shapes(cfg: Any, context: Context = CONTEXT) -> tuple[Any, Any]:
    module = MIXERS.module_of(cfg)
    graphdef, state = nnx.split(jax.eval_shape(lambda: module(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
    return graphdef, nnx.to_pure_dict(state)


def bound(graphdef: Any, params: Any, x: Any) -> Any:
    y, _, _ = nnx.merge(graphdef, params)(x, Segments(jnp.asarray(IDS), jnp.asarray(POSITIONS)), None, {})
    return y * (IDS != 0)[:, :, None]


@pytest.mark.parametrize("name", [n if n in FIRST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_outputs_and_gradients_equal_the_oracle(name: str, rng: np.random.Generator) -> None:
    """Gradients along random directions of each parameter and of the inputs, against central differences."""
    cfg = CONFIGS[name]
    graphdef, shapes = graphdef_and_shapes(cfg)
    params = jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape).astype(np.float32), shapes)
    x, cotangent = (rng.standard_normal((B, T, D)).astype(np.float32) for _ in range(2))

    def objective(operands: Any) -> Any:
        y = bound(graphdef, *operands)
        return jnp.sum(y * cotangent), y

    got, y = jax.jit(jax.grad(objective, has_aux=True))((params, x))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x)))

    def exact(*leaves: np.ndarray) -> np.ndarray:
        return oracle(cfg, *tree.unflatten(leaves))

    assert distance(y, exact(*leaves)) < FORWARD_TOLERANCE
    for i, (path, gradient) in enumerate(jax.tree_util.tree_leaves_with_path(got)):
        for _ in range(3):
            direction = rng.standard_normal(gradient.shape)
            high, low = (
                np.sum(exact(*leaves[:i], leaves[i] + step * direction, *leaves[i + 1 :]) * cotangent)
                for step in (1e-5, -1e-5)
            )
            error = np.sum(gradient * direction) - (high - low) / 2e-5
            assert abs(error) < GRADIENT_TOLERANCE * np.linalg.norm(gradient), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("cfg", "path", "low"),
    [
        (config.GatedDeltaNet(num_heads=20_000, head_dim=1, value_head_dim=1, output_gate=None), ("decay",), 0.0),
        (config.DeltaProduct(num_heads=20_000, head_dim=1, value_head_dim=1, output_gate=None), ("decay",), 0.0),
        (config.KimiDeltaAttention(num_heads=20_000, head_dim=1), (), 1.0),
    ],
    ids=["gated-deltanet", "delta-product", "kimi"],
)
@pytest.mark.parametrize("tensor", [None, 4])
def test_decays_are_drawn_as_published(cfg: Any, path: tuple[str, ...], low: float, tensor: int | None) -> None:
    """exp(A_log) uniform up to 16, softplus(dt_bias) log-uniform in (0.001, 0.1), float32, finite; sharded too."""
    params = draw(cfg, tensor)
    for name in path:
        params = params[name]
    assert params["A_log"].dtype == params["dt_bias"].dtype == jnp.float32
    rate = np.exp(np.asarray(params["A_log"], np.float64))
    log_dt = np.log(np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))).ravel()
    assert_uniform(rate, low, 16.0)
    assert_uniform(log_dt, np.log(1e-3), np.log(1e-1))
    assert abs(np.corrcoef(rate, log_dt)[0, 1]) < 0.03


def test_bounded_kimi_decays_start_at_rate_one() -> None:
    cfg = config.KimiDeltaAttention(num_heads=3, head_dim=2, decay_lower_bound=-5.0)
    np.testing.assert_array_equal(draw(cfg, None)["A_log"], 0.0)


def test_sharded_initialisation_gives_the_same_numbers() -> None:
    cfg = config.GatedDeltaNet(num_heads=4, head_dim=6)
    want, got = draw(cfg, None), draw(cfg, 4)
    assert got["q"]["w"].sharding.shard_shape((8, 4, 6)) == (8, 1, 6)
    assert got["decay"]["A_log"].sharding.shard_shape((4,)) == (1,)
    # The same random bits; XLA may fuse a logarithm differently: a unit in the last place.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6), got, want)


def test_parameters_are_drawn_with_the_published_scales() -> None:
    cfg = config.KimiDeltaAttention(num_heads=4, head_dim=32, value_head_dim=64)
    context = Context(**{**vars(CONTEXT), "width": 256, "num_layers": 8})
    params = draw(cfg, None, context)
    for weight in (params["q"]["w"], params["v"]["w"], params["w_f1"], params["w_g1"]):
        assert np.var(weight) == pytest.approx(1 / 256, rel=0.05)
    for weight in (params["w_f2"], params["w_g2"]):
        assert np.var(weight) == pytest.approx(1 / 64, rel=0.05)
    assert np.var(params["w_o"]) == pytest.approx(2 / 8 / 256, rel=0.05)
    # PyTorch's depthwise convolution: uniform in +-1 / sqrt(4).
    assert_uniform(np.asarray(params["v"]["conv"]).ravel(), -0.5, 0.5, tolerance=0.1)


def test_decays_norms_and_taps_have_no_weight_decay() -> None:
    params = jax.tree.map(np.zeros_like, draw(config.GatedDeltaNet(num_heads=2, head_dim=3), None))
    paths = [path for path, yes in jax.tree_util.tree_leaves_with_path(decayed(params)) if yes]
    names = {jax.tree_util.keystr(path, simple=True, separator=".") for path in paths}
    assert names == {"q.w", "k.w", "v.w", "g.w", "decay.w", "w_b", "w_o"}


def test_value_heads_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match="num_value_heads=3: must be a multiple of num_heads=2"):
        config.GatedDeltaNet(num_heads=2, num_value_heads=3)


def test_heads_that_do_not_divide_by_the_mesh_are_an_error() -> None:
    with (
        jax.set_mesh(make_mesh(config.Mesh(data=2, tensor=4))),
        pytest.raises(ConfigError, match="tensor = 4 must divide every 'heads' axis of the model, and one has size 2"),
    ):
        graphdef_and_shapes(config.GatedDeltaNet(num_heads=2, num_value_heads=4))


def draw(cfg: Any, tensor: int | None, context: Context | None = None) -> Any:
    """Freshly drawn parameters, on a mesh with so many parts of the heads where one is asked for."""
    context = Context(**{**vars(CONTEXT), "width": 8}) if context is None else context
    module = MIXERS.module_of(cfg)

    def init(key: Any) -> Any:
        return nnx.to_pure_dict(nnx.state(module(cfg, context, nnx.Rngs(params=key))))

    if tensor is None:
        return jax.jit(init)(jax.random.key(3))
    with jax.set_mesh(make_mesh(config.Mesh(data=-1, tensor=tensor))):
        return jax.jit(init)(jax.random.key(3))


def assert_uniform(x: np.ndarray, low: float, high: float, tolerance: float = 0.012) -> None:
    """Within the bounds, and each fifth of them holds a fifth of the numbers (0.012: four standard deviations)."""
    assert np.isfinite(x).all()
    assert low - 1e-5 * (high - low) <= x.min() and x.max() <= high + 1e-5 * (high - low)
    counts, _ = np.histogram(x, bins=5, range=(low - 1e-5 * (high - low), high + 1e-5 * (high - low)))
    np.testing.assert_allclose(counts / x.size, 0.2, atol=tolerance)


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
