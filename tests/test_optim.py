"""Learning rates at the steps that matter, exactly which parameters decay, and AdamW by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.optim import decayed, make_optimizer, make_schedule


def rates(schedule: config.Schedule, steps: int, peak: float = 2.0) -> np.ndarray:
    rate = make_schedule(config.AdamW(peak_lr=peak, schedule=schedule), steps)
    return np.asarray(jax.vmap(rate)(jnp.arange(steps)))


def test_warm_up_moves_at_once_and_reaches_the_peak() -> None:
    got = rates(config.Cosine(warmup_steps=4), 100)
    np.testing.assert_allclose(got[:5], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)


def test_cosine_falls_by_half_a_cosine_to_its_final_fraction() -> None:
    got = rates(config.Cosine(warmup_steps=10, final_fraction=0.1), 110)
    want = [2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * i / 100))) for i in range(100)]
    np.testing.assert_allclose(got[10:], want, rtol=1e-5)
    assert got[10 + 50] == pytest.approx(1.1, rel=1e-5)


def test_plateau_lasts_until_the_linear_decay() -> None:
    got = rates(config.WarmupStableDecay(warmup_steps=5, decay_steps=20, final_fraction=0.5), 100)
    np.testing.assert_allclose(got[4:81], 2.0, rtol=1e-6)
    np.testing.assert_allclose(got[80:], 2.0 - np.arange(20) / 20, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_no_warm_up_starts_at_the_peak(warmup_steps: int) -> None:
    assert rates(config.Cosine(warmup_steps=warmup_steps), 50)[0] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (config.Cosine(warmup_steps=100), 100),
        (config.Cosine(warmup_steps=101), 100),
        (config.WarmupStableDecay(warmup_steps=50, decay_steps=51), 100),
    ],
)
def test_schedule_that_does_not_fit_is_an_error(schedule: config.Schedule, steps: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"^optimizer.schedule.warmup_steps=\d+: .* do not fit into train.steps={steps};"
    ):
        make_schedule(config.AdamW(schedule=schedule), steps)


def test_schedule_may_have_no_plateau() -> None:
    assert rates(config.WarmupStableDecay(warmup_steps=50, decay_steps=50), 100)[49] == pytest.approx(2.0)


def test_unknown_optimizer_names_the_known_ones() -> None:
    class Sign(config.Optimizer):
        peak_lr = 1.0

    with pytest.raises(ConfigError, match="optimizer: Sign is not registered; known are AdamW"):
        make_optimizer(Sign(), 10)


def test_exactly_the_weights_of_a_griffin_decay() -> None:
    recurrent = config.Block(
        mixer=config.RGLRU(width=12, num_heads=2, bias=True), ffn=config.GeGLU(hidden=16, bias=True)
    )
    attention = config.Block(
        mixer=config.Attention(num_heads=2, num_kv_heads=1, qk_norm=True, out_bias=True), ffn=config.GeGLU(hidden=16)
    )
    model = config.Model(
        vocab_size=17,
        width=8,
        num_layers=4,
        pattern=(recurrent, attention),
        tied_embedding=False,
        prologue=(recurrent,),
    )
    init, _ = build(model, config.Kernels())
    params = jax.eval_shape(init, jax.random.key(0))
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params)):
        block_name = [str(entry.key) for entry in path if not str(entry.key).isdigit()]
        names[decays].add(
            ".".join(n for n in block_name if n not in ("stack", "prologue", "repeats", "tail", "epilogue"))
        )
    assert names[True] == {
        "embedding",
        "w_head",
        *(f"mixer.{name}.w" for name in ("in_x", "in_y", "out")),
        *(f"mixer.{name}" for name in ("w_conv", "w_gate_a", "w_gate_x", "w_q", "w_k", "w_v", "w_o")),
        *(f"ffn.{name}.w" for name in ("gate", "up", "down")),
    }
    assert names[False] == {
        "norm.scale",
        "mixer_norm.scale",
        "ffn_norm.scale",
        *(f"mixer.{name}.b" for name in ("in_x", "in_y", "out")),
        *(f"mixer.{name}" for name in ("b_conv", "b_gate_a", "b_gate_x", "decay", "b_o")),
        *(f"mixer.{name}.scale" for name in ("q_norm", "k_norm")),
        *(f"ffn.{name}.b" for name in ("gate", "up", "down")),
    }


def test_adamw_clips_then_steps_and_decays_weights_alone() -> None:
    """Two steps by hand in float64."""
    cfg = config.AdamW(peak_lr=0.1, weight_decay=0.3, b1=0.8, b2=0.9, eps=1e-3, clip_norm=2.0)
    cfg = config.AdamW(**{**vars(cfg), "schedule": config.Cosine(warmup_steps=0)})
    update, schedule = make_optimizer(cfg, 10)
    params = {"w": jnp.array([1.0, -2.0]), "scale": jnp.array([3.0])}
    steps = [
        {"w": jnp.array([3.0, 0.0]), "scale": jnp.array([4.0])},
        {"w": jnp.array([0.1, 0.2]), "scale": jnp.array([0.3])},
    ]
    state = update.init(params)
    want = {name: np.asarray(p, np.float64) for name, p in params.items()}
    m, v = ({name: np.zeros(p.shape) for name, p in params.items()} for _ in range(2))
    for i, grads in enumerate(steps):
        updates, state = update.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()))
        for name, g in grads.items():
            g = np.asarray(g, np.float64) * min(1.0, 2.0 / norm)
            m[name], v[name] = 0.8 * m[name] + 0.2 * g, 0.9 * v[name] + 0.1 * g**2
            step = (m[name] / (1 - 0.8 ** (i + 1))) / (np.sqrt(v[name] / (1 - 0.9 ** (i + 1))) + 1e-3)
            decay = 0.3 * want[name] if name == "w" else 0.0
            want[name] = want[name] - float(schedule(i)) * (step + decay)
    for name, p in params.items():
        np.testing.assert_allclose(p, want[name], rtol=1e-5)
