"""One training step: what it optimises, what it refuses, and that nothing leaves the device."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm.config import RGLRU, AdamW, Attention, Block, Cosine, GeGLU, Kernels, Model, Train
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.model.lm import LM
from hybridlm.optim import make_optimizer
from hybridlm.train.step import SPIKE_MINIMUM, SPIKE_WINDOW, Recent, TrainState, init_state, make_train_step, spikes

ROWS, LENGTH = 4, 11
MODEL = Model(
    vocab_size=17,
    width=8,
    num_layers=2,
    pattern=(
        Block(mixer=RGLRU(width=8, num_heads=2), ffn=GeGLU(hidden=12)),
        Block(mixer=Attention(num_heads=2, num_kv_heads=1, window=4), ffn=None),
    ),
)
INIT, BIND = build(MODEL, Kernels())
SGD = optax.sgd(1.0)  # the update is the gradient itself


def constant(_: Any) -> float:
    return 1.0


def make_batch(seed: int) -> dict[str, jax.Array]:
    """Rows with 11, 7, 2 and 0 real tokens, of two documents where there is room."""
    rng = np.random.default_rng(seed)
    real = np.arange(LENGTH) < np.array([11, 7, 2, 0])[:, None]
    first = np.broadcast_to(np.arange(LENGTH) < 5, real.shape)
    return jax.device_put(
        {
            "tokens": rng.integers(0, 17, (ROWS, LENGTH)).astype(np.int32),
            "targets": rng.integers(0, 17, (ROWS, LENGTH)).astype(np.int32),
            "segment_ids": np.where(real, np.where(first, 1, 2), 0).astype(np.int32),
            "positions": np.where(real, np.arange(LENGTH) - np.where(first, 0, 5), 0).astype(np.int32),
            "target_bytes": rng.integers(0, 4, (ROWS, LENGTH)).astype(np.int32),
            "loss_weight": real.astype(np.float32),
        }
    )


def fresh(optimizer: optax.GradientTransformation) -> TrainState:
    return jax.jit(partial(init_state, INIT, optimizer, 0))()


@jax.jit
def logits_of(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    lm = BIND(params)
    return lm.logits(lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))[0])


def plain_objective(params: Any, batch: dict[str, jax.Array], z_loss: float) -> jax.Array:
    """Mean over real tokens of -log p + z_loss * (log Z)^2, from whole logits."""
    y = logits_of(params, batch)
    log_z = jnp.log(jnp.sum(jnp.exp(y), axis=-1))
    nll = log_z - jnp.take_along_axis(y, batch["targets"][..., None], axis=-1)[..., 0]
    weight = batch["loss_weight"]
    return jnp.sum((nll + z_loss * log_z**2) * weight) / jnp.sum(weight)


def relative(actual: Any, expected: Any) -> float:
    """Relative L2 distance of two pytrees."""
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)]) for t in (actual, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def adamw_step() -> tuple[optax.GradientTransformation, Any]:
    optimizer, schedule = make_optimizer(AdamW(schedule=Cosine(warmup_steps=2)), 20)
    return optimizer, make_train_step(BIND, optimizer, schedule, Train(batch_size=ROWS, z_loss=1e-3))


@pytest.mark.parametrize(("num_microbatches", "z_loss"), [(1, 0.0), (4, 1e-2)])
def test_the_update_is_the_gradient_of_the_mean_over_real_tokens(num_microbatches: int, z_loss: float) -> None:
    train = Train(batch_size=ROWS, num_microbatches=num_microbatches, z_loss=z_loss)
    state, batch = fresh(SGD), make_batch(1)
    before = jax.tree.map(np.asarray, state.params)
    expected = jax.jit(jax.grad(plain_objective), static_argnums=2)(state.params, batch, z_loss)
    state, metrics = make_train_step(BIND, SGD, constant, train)(state, batch)
    update = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    assert relative(update, expected) < 1e-4  # float32 sums in another order, and old - new rounds
    assert float(metrics["loss"]) == pytest.approx(float(plain_objective(before, batch, 0.0)), rel=1e-5)
    norm = math.sqrt(sum(float(np.sum(np.square(g, dtype=np.float64))) for g in jax.tree.leaves(expected)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_metrics_equal_a_float64_computation(adamw_step: Any) -> None:
    optimizer, step = adamw_step
    state, batch = fresh(optimizer), make_batch(2)
    y = np.asarray(logits_of(state.params, batch), np.float64)
    nats = tokens = num_bytes = 0.0
    for row in range(ROWS):
        for t in range(LENGTH):
            if batch["loss_weight"][row, t]:
                nats += np.log(np.exp(y[row, t]).sum()) - y[row, t, batch["targets"][row, t]]
                tokens += 1
                num_bytes += int(batch["target_bytes"][row, t])
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(nats / tokens, rel=1e-5)
    assert float(metrics["bits_per_byte"]) == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert float(metrics["batch_tokens"]) == tokens == 20
    assert float(metrics["lr"]) == pytest.approx(1e-3 / 2)


def test_what_stands_on_padding_does_not_matter(adamw_step: Any) -> None:
    optimizer, step = adamw_step
    batch = make_batch(3)
    real = batch["loss_weight"] > 0
    scribbled = batch | {name: jnp.where(real, batch[name], 5) for name in ("tokens", "targets", "target_bytes")}
    (one, metrics), (other, scribbled_metrics) = (step(fresh(optimizer), b) for b in (batch, scribbled))
    assert float(metrics["loss"]) == float(scribbled_metrics["loss"])
    assert relative(one.params, other.params) < 1e-6


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(adamw_step: Any, poison: float) -> None:
    optimizer, step = adamw_step
    good, more = make_batch(4), make_batch(5)
    bad = good | {"loss_weight": good["loss_weight"].at[0, 3].set(poison)}

    def run(batches: list[Any]) -> tuple[TrainState, list[dict[str, float]]]:
        state, seen = fresh(optimizer), []
        for batch in batches:
            state, metrics = step(state, batch)
            seen.append({name: float(value) for name, value in metrics.items()})
        return state, seen

    undisturbed, expected = run([good, more])
    state, seen = run([good, bad, bad, more])
    assert [m["nonfinite_in_a_row"] for m in seen] == [0, 1, 2, 0]
    assert [m["nonfinite_total"] for m in seen] == [0, 1, 2, 2]
    assert not math.isfinite(seen[1]["loss"])
    assert seen[3]["loss"] == expected[1]["loss"]
    assert seen[3]["lr"] == expected[1]["lr"]
    assert int(state.step) == 4
    for mine, theirs in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((undisturbed.params, undisturbed.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, theirs)


def recent(loss: list[float], grad_norm: list[float]) -> Recent:
    """Rings after these accepted steps, written one by one."""
    rings = {"loss": np.zeros(SPIKE_WINDOW, np.float32), "grad_norm": np.zeros(SPIKE_WINDOW, np.float32)}
    for i, values in enumerate(zip(loss, grad_norm, strict=True)):
        for ring, value in zip(rings.values(), values, strict=True):
            ring[i % SPIKE_WINDOW] = value
    return Recent(**{name: jnp.asarray(ring) for name, ring in rings.items()}, accepted=jnp.asarray(len(loss)))


@pytest.mark.parametrize("steps", [SPIKE_MINIMUM - 1, SPIKE_MINIMUM, SPIKE_WINDOW + 37])
@pytest.mark.parametrize("which", ["loss", "grad_norm"])
def test_a_spike_is_so_many_deviations_above_the_mean_of_the_window(
    rng: np.random.Generator, steps: int, which: str
) -> None:
    seen = {"loss": list(3 + 0.1 * rng.standard_normal(steps)), "grad_norm": list(1 + rng.random(steps))}
    window = np.array(seen[which][-SPIKE_WINDOW:], np.float64)
    limit = window.mean() + 4 * window.std()
    usual = {name: float(np.mean(values)) for name, values in seen.items()}
    for value, above in ((limit * 0.999, False), (limit * 1.001, True)):
        told = usual | {which: value}
        spiked = spikes(recent(**seen), jnp.asarray(told["loss"]), jnp.asarray(told["grad_norm"]), 4.0)
        assert bool(spiked) == (above and steps >= SPIKE_MINIMUM)


def test_a_step_whose_loss_spikes_changes_nothing_and_is_not_remembered() -> None:
    optimizer, schedule = make_optimizer(AdamW(schedule=Cosine(warmup_steps=2)), 1000)
    step = make_train_step(BIND, optimizer, schedule, Train(batch_size=ROWS, spike_sigma=6.0))
    state, batches = fresh(optimizer), [make_batch(seed) for seed in range(5)]
    for i in range(SPIKE_MINIMUM):
        state, metrics = step(state, batches[i % 5])
        assert int(metrics["nonfinite_total"]) == 0
    before = jax.tree.map(np.asarray, (state.params, state.opt_state, state.recent))
    # Twice the weight of some tokens, and less than nothing of others: the mean is far off.
    odd = batches[0] | {"loss_weight": batches[0]["loss_weight"] * jnp.linspace(-40.0, 44.0, LENGTH)}
    state, metrics = step(state, odd)
    assert math.isfinite(float(metrics["loss"]))
    assert int(metrics["nonfinite_in_a_row"]) == 1
    for mine, theirs in zip(
        jax.tree.leaves(before), jax.tree.leaves((state.params, state.opt_state, state.recent)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    state, metrics = step(state, batches[1])
    assert int(metrics["nonfinite_in_a_row"]) == 0
    assert int(state.recent.accepted) == SPIKE_MINIMUM + 1


def test_the_state_is_donated(adamw_step: Any) -> None:
    optimizer, step = adamw_step
    state = fresh(optimizer)
    step(state, make_batch(6))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_steps_move_nothing_between_host_and_device(adamw_step: Any) -> None:
    optimizer, step = adamw_step
    state, batches = fresh(optimizer), [make_batch(seed) for seed in range(3)]
    state, _ = step(state, batches[0])
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = step(state, batch)
    assert int(state.step) == 4
    assert metrics["loss"].shape == ()


def test_aux_losses_add_up_over_layers_and_weigh_as_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    features = LM.features

    def with_aux(self: LM, tokens: Any, segments: Segments, **told: Any) -> Any:
        x, state, aux = features(self, tokens, segments, **told)
        losses = jnp.stack([jnp.mean(jnp.square(x)), jnp.mean(jnp.sin(x))])
        return x, state, aux | {"balance_loss": losses, "load": jnp.array([2.0, 4.0])}

    def objective(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        total = plain_objective(params, batch, 0.0)
        for part in ({name: x[i::2] for name, x in batch.items()} for i in range(2)):
            x = features(BIND(params), part["tokens"], Segments(part["segment_ids"], part["positions"]))[0]
            share = jnp.sum(part["loss_weight"]) / jnp.sum(batch["loss_weight"])
            total += share * (jnp.mean(jnp.square(x)) + jnp.mean(jnp.sin(x)))
        return total

    state, batch = fresh(SGD), make_batch(7)
    expected = jax.jit(jax.grad(objective))(state.params, batch)
    before = jax.tree.map(np.asarray, state.params)
    monkeypatch.setattr(LM, "features", with_aux)
    state, metrics = make_train_step(BIND, SGD, constant, Train(batch_size=ROWS, num_microbatches=2))(state, batch)
    update = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    assert relative(update, expected) < 1e-4
    assert float(metrics["aux/load"]) == pytest.approx(3.0)
    assert metrics["layers/load"].tolist() == pytest.approx([2.0, 4.0])
