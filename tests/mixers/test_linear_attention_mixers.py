"""The mixers over gated linear attention against token-by-token float64 oracles, and how their parameters are drawn.

Yang et al., 2023, arXiv:2312.06635; Sun et al., 2023, arXiv:2307.08621; Qin et al., 2024, arXiv:2404.07904; Zhang et
al., 2024, arXiv:2409.07146; Dao and Gu, 2024, arXiv:2405.21060.

Letters: b batch, t time, d model width, h heads, k key dim, v value dim, m slots, g groups.
"""

import sys
from collections.abc import Callable
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

D = 10
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())
# Lengths of the documents of two rows, what is left is padding: over several chunks, and short for the gradients.
LONG, SHORT = ((90, [[3, 70, 17], [1, 1, 80]]), (8, [[4, 4], [1, 4]]))


def softplus(z: Any, xp: Any) -> Any:
    return xp.log(1 + xp.exp(z))


def sigmoid(z: Any, xp: Any) -> Any:
    return 1 / (1 + xp.exp(-z))


def silu(z: Any, xp: Any) -> Any:
    return z * sigmoid(z, xp)


def rms(x: Any, eps: float, xp: Any) -> Any:
    return x / xp.sqrt(xp.mean(x**2, axis=-1, keepdims=True) + eps)


def heads(x: Any, w: Any, xp: Any) -> Any:
    return xp.einsum("td,dhk->thk", x, w)


def convolved(u: Any, taps: Any, xp: Any) -> Any:
    """y_t = sum_j taps[-1 - j] u_{t-j} over the tokens that there are."""
    return xp.stack([sum(taps[-1 - j] * u[t - j] for j in range(min(len(taps), t + 1))) for t in range(len(u))])


def recurrence(q: Any, k: Any, v: Any, a: Any, scale: float, xp: Any) -> Any:
    """S_t = Diag(a_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, for [t, h, k] and [t, h, v]."""
    s, outputs = 0.0, []
    for t in range(len(q)):
        s = a[t][:, :, None] * s + k[t][:, :, None] * v[t][:, None, :]
        outputs.append(scale * xp.einsum("hkv,hk->hv", s, q[t]))
    return xp.stack(outputs)


def gated_out(o: Any, x: Any, p: Any, xp: Any) -> Any:
    """W_o (rmsnorm(o) * silu(W_g x)), the norm per head."""
    y = rms(o, CONTEXT.norm_eps, xp) * p["norm"]["scale"] * silu(heads(x, p["gate"]["w"], xp), xp)
    return xp.einsum("thv,hvd->td", y, p["w_o"])


def wide_out(o: Any, eps: float, p: Any, xp: Any, num_groups: int = 1) -> Any:
    """W_o rmsnorm(o), the norm over the channels of h / groups heads together."""
    y = rms(o.reshape(len(o), num_groups, -1), eps, xp).reshape(o.shape) * p["norm"]["scale"]
    return xp.einsum("thv,hvd->td", y, p["w_o"])


def gated_linear_attention(cfg: config.GatedLinearAttention, p: Any, x: Any, xp: Any) -> Any:
    q, k, v = (heads(x, p[name]["w"], xp) for name in "qkv")
    a = sigmoid(heads(x @ p["w_decay1"], p["w_decay2"], xp) + p["b_decay"], xp) ** (1 / cfg.decay_temperature)
    return gated_out(recurrence(q, k, v, a, cfg.head_dim**-0.5, xp), x, p, xp)


def simple_gla(cfg: config.SimpleGLA, p: Any, x: Any, xp: Any) -> Any:
    q, k, v = (heads(x, p[name]["w"], xp) for name in "qkv")
    if cfg.conv_width is not None:
        q, k, v = (silu(convolved(u, p[n]["conv"], xp), xp) for u, n in zip((q, k, v), "qkv", strict=True))
    a = sigmoid(x @ p["w_decay"] + p["b_decay"], xp)[:, :, None] ** (1 / cfg.decay_temperature)
    return gated_out(recurrence(q, k, v, a, cfg.head_dim**-0.5, xp), x, p, xp)


def retnet(cfg: config.RetNet, p: Any, x: Any, xp: Any) -> Any:
    """Keys and queries as complex numbers q e^(i t theta), one for each pair of channels (j, j + k/2)."""
    half = cfg.head_dim // 2
    angle = np.arange(len(x))[:, None, None] * cfg.rope_theta ** (-np.arange(half) / half)

    def rotated(z: Any) -> Any:
        z = (z[..., :half] + 1j * z[..., half:]) * np.exp(1j * angle)
        return xp.concatenate([z.real, z.imag], axis=-1)

    q, k, v = (heads(x, p[name]["w"], xp) for name in "qkv")
    gamma = np.broadcast_to(1 - 2.0 ** (-5 - np.arange(cfg.num_heads)), q.shape[:2])[:, :, None]
    return gated_out(recurrence(rotated(q), rotated(k), v, gamma, cfg.head_dim**-0.5, xp), x, p, xp)


def hgrn2(cfg: config.HGRN2, p: Any, x: Any, xp: Any) -> Any:
    bound = sigmoid(p["lower_bound"], xp) if cfg.lower_bound else 0.0
    f = bound + (1 - bound) * sigmoid(heads(x, p["w_f"], xp), xp)
    q, v = silu(heads(x, p["q"]["w"], xp), xp), heads(x, p["v"]["w"], xp)
    return wide_out(recurrence(q, 1 - f, v, f, cfg.head_dim**-0.5, xp), cfg.norm_eps, p, xp)


def gated_slot_attention(cfg: config.GatedSlotAttention, p: Any, x: Any, xp: Any) -> Any:
    q, k, v = (silu(heads(x, p[name]["w"], xp), xp) for name in "qkv")
    a = sigmoid(heads(x, p["w_decay"], xp), xp) ** (1 / cfg.decay_temperature)  # t h m
    keys = values = 0.0  # h m k, h m v
    outputs = []
    for t in range(len(x)):
        keys = a[t][:, :, None] * keys + (1 - a[t])[:, :, None] * k[t][:, None, :]
        values = a[t][:, :, None] * values + (1 - a[t])[:, :, None] * v[t][:, None, :]
        weights = xp.exp(xp.einsum("hmk,hk->hm", keys, q[t]))
        weights = weights / xp.sum(weights, axis=1, keepdims=True)
        outputs.append(xp.einsum("hmv,hm->hv", values, weights))
    return wide_out(silu(xp.stack(outputs), xp), cfg.norm_eps, p, xp)


def mamba2(cfg: config.Mamba2, p: Any, x: Any, xp: Any) -> Any:
    """Each head reads its group's B and C; the state has a row per state dim."""
    share = cfg.num_heads // cfg.num_groups
    u = silu(convolved(heads(x, p["x"]["w"], xp), p["x"]["conv"], xp) + p["x"]["conv_bias"], xp)
    bc = silu(convolved(heads(x, p["w_bc"], xp), p["conv_bc"], xp) + p["conv_bc_bias"], xp)
    b, c = (xp.repeat(part, share, axis=1) for part in (bc[:, : cfg.num_groups], bc[:, cfg.num_groups :]))
    dt = softplus(x @ p["w_dt"] + p["dt_bias"], xp)
    dt = xp.minimum(xp.maximum(dt, cfg.dt_low), np.inf if cfg.dt_high is None else cfg.dt_high)[:, :, None]
    a = xp.exp(-xp.exp(p["log_rate"])[:, None] * dt)
    y = recurrence(c, b, dt * u, a, 1.0, xp) + p["skip"][:, None] * u
    return wide_out(y * silu(heads(x, p["z"]["w"], xp), xp), CONTEXT.norm_eps, p, xp, cfg.num_groups)


ORACLES: dict[type[config.Mixer], Callable[..., Any]] = {
    config.GatedLinearAttention: gated_linear_attention,
    config.SimpleGLA: simple_gla,
    config.RetNet: retnet,
    config.HGRN2: hgrn2,
    config.GatedSlotAttention: gated_slot_attention,
    config.Mamba2: mamba2,
}
configs = pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(cfg, id=f"{type(cfg).__name__}{i}")
        for cls in ORACLES
        for i, cfg in enumerate(MIXERS.entries[cls].examples)
    ],
)


def packed(lengths: tuple[int, list[list[int]]]) -> tuple[Segments, list[tuple[int, int, int]]]:
    """Segments [b, t] and the (row, first token, end) of each document."""
    time, rows = lengths
    ids, positions = np.zeros((2, len(rows), time), np.int32)
    documents = []
    for row, sizes in enumerate(rows):
        for i, size in enumerate(sizes):
            first = sum(sizes[:i])
            ids[row, first : first + size], positions[row, first : first + size] = i + 1, np.arange(size)
            documents.append((row, first, first + size))
        rest = sum(sizes)
        positions[row, rest:] = np.arange(time - rest)
    return Segments(jnp.asarray(ids), jnp.asarray(positions)), documents


def make(cfg: config.Mixer, rng: np.random.Generator) -> tuple[Any, Any]:
    """The module's definition and its parameters, all away from their constants, as nested dicts of float32 arrays."""
    module = MIXERS.module_of(cfg)
    made = jax.eval_shape(lambda: module(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0))))
    graphdef, state = nnx.split(made)
    return graphdef, jax.tree.map(
        lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), nnx.to_pure_dict(state)
    )


def bound(graphdef: Any, params: Any, x: Any, segments: Segments) -> Any:
    params, x = jax.tree.map(jnp.asarray, (params, x))
    y, _, _ = nnx.merge(graphdef, params)(x, segments, None, {})
    return y * (segments.ids != 0)[:, :, None]


@configs
def test_forward_equals_the_oracle(cfg: config.Mixer, rng: np.random.Generator) -> None:
    graphdef, params = make(cfg, rng)
    segments, documents = packed(LONG)
    x = rng.standard_normal((*segments.ids.shape, D)).astype(np.float32)
    y = jax.jit(lambda p, x: bound(graphdef, p, x, segments))(params, x)
    wide, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
    want = np.zeros(x.shape)
    for row, first, end in documents:
        want[row, first:end] = ORACLES[type(cfg)](cfg, wide, x[row, first:end], np)
    assert distance(y, want) < FORWARD_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("cls", ORACLES, ids=lambda cls: cls.__name__)
def test_gradients_equal_the_oracle(cls: type[config.Mixer], rng: np.random.Generator) -> None:
    cfg = MIXERS.entries[cls].examples[1]
    graphdef, params = make(cfg, rng)
    segments, documents = packed(SHORT)
    x, cotangent = (rng.standard_normal((*segments.ids.shape, D)).astype(np.float32) for _ in range(2))

    def objective(p: Any, x: Any) -> Any:
        return jnp.sum(bound(graphdef, p, x, segments) * cotangent)

    def oracle_objective(p: Any, x: Any) -> Any:
        return sum(jnp.sum(ORACLES[cls](cfg, p, x[r, i:j], jnp) * cotangent[r, i:j]) for r, i, j in documents)

    got = jax.jit(jax.grad(objective, argnums=(0, 1)))(params, x)
    with jax.enable_x64(True):
        wide, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
        # Not jitted: thousands of unrolled operations compile for a minute, and run one by one in seconds.
        want = jax.grad(oracle_objective, argnums=(0, 1))(wide, x)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert b.dtype == np.float64
        assert distance(a, b) < GRADIENT_TOLERANCE, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "shape", [None, (2, 4)], ids=["one device", "fsdp=2, tensor=4"]
)  # Others lose these statistics where parameters are drawn sharded.
def test_mamba2_draws_rates_and_steps_as_published(shape: tuple[int, int] | None) -> None:
    cfg = config.Mamba2(num_heads=20_000, head_dim=1, state_dim=1)
    module, context = MIXERS.module_of(cfg), Context(**{**vars(CONTEXT), "width": 2})

    def draw(key: Any) -> Any:
        made = module(cfg, context, nnx.Rngs(params=key))
        return {name: getattr(made, name)[...] for name in ("log_rate", "dt_bias", "skip")}

    key = jax.random.key(5)
    if shape is None:
        drawn = jax.jit(draw)(key)
    else:
        with jax.set_mesh(make_mesh(config.Mesh(data=1, fsdp=shape[0], tensor=shape[1]))):
            drawn = jax.jit(draw)(key)
        assert drawn["log_rate"].sharding.shard_shape((20_000,)) == (20_000 // shape[1],)
    rate, dt = np.exp(np.float64(drawn["log_rate"])), softplus(np.float64(drawn["dt_bias"]), np)
    assert all(array.dtype == np.float32 for array in drawn.values())
    for values, low, high in ((rate, 1.0, 16.0), (np.log(dt), np.log(1e-3), np.log(0.1))):
        assert low - 1e-3 < values.min() < low + 0.01 and high - 0.01 < values.max() < high + 1e-3
        counts, _ = np.histogram(values, bins=5)
        np.testing.assert_allclose(counts / values.size, 0.2, atol=0.017)  # six standard deviations
    np.testing.assert_array_equal(drawn["skip"], 1.0)


def test_hgrn2_starts_at_its_lower_bound_and_has_none_without_one() -> None:
    def draw(bound: float) -> Any:
        cfg = config.HGRN2(num_heads=2, head_dim=8, value_head_dim=4, lower_bound=bound)
        return nnx.to_pure_dict(nnx.state(MIXERS.module_of(cfg)(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0)))))

    np.testing.assert_allclose(sigmoid(np.float64(draw(0.75)["lower_bound"]), np), np.full((2, 8), 0.75), rtol=1e-6)
    assert "lower_bound" not in draw(0.0)


def test_hgrn2_bound_of_minus_one_hundred_is_none(rng: np.random.Generator) -> None:
    """So that the first layer of a published model fits the scanned stack."""
    with_bound = config.HGRN2(num_heads=2, head_dim=8, value_head_dim=4, lower_bound=0.5)
    without = config.HGRN2(num_heads=2, head_dim=8, value_head_dim=4)
    graphdef, params = make(with_bound, rng)
    params["lower_bound"] = np.full_like(params["lower_bound"], -100.0)
    segments, _ = packed(SHORT)
    x = 10 * rng.standard_normal((*segments.ids.shape, D)).astype(np.float32)
    got = jax.jit(lambda p: bound(graphdef, p, x, segments))(params)
    graphdef_without, _ = make(without, rng)
    del params["lower_bound"]
    want = jax.jit(lambda p: bound(graphdef_without, p, x, segments))(params)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_weight_decay_spares_decays_steps_skips_norms_and_biases() -> None:
    for cls in ORACLES:
        for cfg in MIXERS.entries[cls].examples:
            _, params = make(cfg, np.random.default_rng(0))
            names = {
                jax.tree_util.keystr(path): on for path, on in jax.tree_util.tree_leaves_with_path(decayed(params))
            }
            spared = {name.rsplit("['", 1)[1][:-2] for name, on in names.items() if not on}
            assert spared <= {
                *("log_rate", "dt_bias", "skip", "scale", "b_decay", "lower_bound"),
                *("conv", "conv_bias", "conv_bc", "conv_bc_bias"),
            }
            assert names["['w_o']"]


def test_mamba2_groups_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match="num_heads=6: must divide by num_groups=4"):
        config.Mamba2(num_heads=6, num_groups=4)
    with pytest.raises(ConfigError, match=r"dt_high=0.1: must be above dt_low=0.2"):
        config.Mamba2(num_heads=6, dt_low=0.2, dt_high=0.1)


def test_heads_that_do_not_divide_by_the_mesh_are_an_error() -> None:
    with jax.set_mesh(make_mesh(config.Mesh(data=2, tensor=4))):
        for cls in ORACLES:
            cfg = MIXERS.entries[cls].examples[0]
            cfg = type(cfg)(**{**vars(cfg), "num_heads": 6})
            with pytest.raises(ConfigError, match="tensor = 4 must divide every 'heads' axis of the model"):
                jax.eval_shape(lambda cfg=cfg: MIXERS.module_of(cfg)(cfg, CONTEXT, nnx.Rngs(params=jax.random.key(0))))


def test_mamba2_equals_hugging_face(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Mamba2Mixer in float32 with two groups, its weights mapped onto ours."""
    torch = pytest.importorskip("torch", reason="the published implementation runs on PyTorch")
    for kernels in ("fla", "mamba_ssm", "causal_conv1d"):  # used where found, and they need a GPU
        monkeypatch.setitem(sys.modules, kernels, None)
    published = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="needs transformers")
    h, p, n, g, w = 6, 4, 5, 2, 4
    d, inner = 12, h * p
    theirs = published.Mamba2Mixer(
        published.Mamba2Config(
            num_heads=h, head_dim=p, hidden_size=d, expand=2, state_size=n, n_groups=g, conv_kernel=w, vocab_size=8,
            num_hidden_layers=1, layer_norm_epsilon=1e-6, chunk_size=16, time_step_limit=(0.2, 1.5),
        ),
        layer_idx=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.from_numpy(0.4 * rng.standard_normal(parameter.shape).astype(np.float32)))
    weights = {name: np.asarray(parameter.detach()) for name, parameter in theirs.named_parameters()}
    z, x, bc, dt = np.split(weights["in_proj.weight"].T, np.cumsum([inner, inner, 2 * g * n]), axis=1)
    taps, taps_bc = np.split(weights["conv1d.weight"][:, 0].T, [inner], axis=1)
    bias, bias_bc = np.split(weights["conv1d.bias"], [inner])
    params = {
        "z": {"w": z.reshape(d, h, p)},
        "x": {"w": x.reshape(d, h, p), "conv": taps.reshape(w, h, p), "conv_bias": bias.reshape(h, p)},
        "w_bc": bc.reshape(d, 2 * g, n),
        "conv_bc": taps_bc.reshape(w, 2 * g, n),
        "conv_bc_bias": bias_bc.reshape(2 * g, n),
        "w_dt": dt,
        "dt_bias": weights["dt_bias"],
        "log_rate": weights["A_log"],
        "skip": weights["D"],
        "norm": {"scale": weights["norm.weight"].reshape(h, p)},
        "w_o": weights["out_proj.weight"].T.reshape(h, p, d),
    }
    cfg = config.Mamba2(num_heads=h, head_dim=p, state_dim=n, num_groups=g, conv_width=w, dt_low=0.2, dt_high=1.5)
    context = Context(**{**vars(CONTEXT), "width": d})
    module = MIXERS.module_of(cfg)
    graphdef = nnx.graphdef(jax.eval_shape(lambda: module(cfg, context, nnx.Rngs(params=jax.random.key(0)))))
    inputs = rng.standard_normal((2, 37, d)).astype(np.float32)
    segments, _ = packed((37, [[37], [37]]))
    with torch.no_grad():
        want = theirs(torch.from_numpy(inputs)).numpy()
    assert distance(bound(graphdef, params, inputs, segments), want) < FORWARD_TOLERANCE


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
