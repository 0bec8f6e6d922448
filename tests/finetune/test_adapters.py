"""Adapters against their formulas in plain code, and what training leaves alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.config import Config, Finetune, LoRA, Mesh
from hybridlm.finetune.adapters import ADAPTERS, Axes, adapters_of, base_of, merged, targets_of
from hybridlm.finetune.arrays import merged_arrays
from hybridlm.finetune.build import build_trained
from hybridlm.finetune.paths import by_path
from hybridlm.model import build
from hybridlm.sharding import make_mesh
from hybridlm.train.program import StepProgram, step_program

LORAS = [LoRA(rank=3, alpha=6.0), LoRA(rank=3, alpha=6.0, dora=True)]


@pytest.fixture(scope="session")
def two_kinds(tiny_config: Config) -> Config:
    """Two repeats of a recurrent block and one of attention, which alone has an FFN."""
    recurrent, _, attention = tiny_config.model.pattern
    pattern = (replace(recurrent, ffn=None), replace(attention, ffn=recurrent.ffn))
    return replace(tiny_config, model=replace(tiny_config.model, num_layers=4, pattern=pattern))


@pytest.fixture(scope="session")
def one_kind(two_kinds: Config) -> Config:
    """Two layers of that attention."""
    return replace(two_kinds, model=replace(two_kinds.model, num_layers=2, pattern=two_kinds.model.pattern[1:]))


def with_lora(config: Config, lora: LoRA | None, **settings: Any) -> Config:
    return replace(config, finetune=Finetune(lora=lora, **settings))


def drawn(config: Config, rng: np.random.Generator) -> dict[str, Any]:
    """Parameters whose adapters all do something."""
    shapes = jax.eval_shape(build_trained(config)[0], jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32), shapes)


def relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize(
    ("own", "inputs", "outputs"), [((), (7,), (5,)), ((2,), (7,), (3, 4)), ((2,), (3, 4), (7,)), ((2, 3), (5,), (4,))]
)
def test_a_merged_matrix_is_the_formula(
    rng: np.random.Generator, own: tuple, inputs: tuple, outputs: tuple, is_dora: bool
) -> None:
    """Each matrix on its own, in float64: W + s A B, and for DoRA each output's column at the norm m."""
    num, i, o, r = int(np.prod(own)), int(np.prod(inputs)), int(np.prod(outputs)), 2
    w, a, b = rng.standard_normal((num, i, o)), rng.standard_normal((num, i, r)), rng.standard_normal((num, r, o))
    m = rng.uniform(0.5, 2.0, (num, o))
    expected = np.stack([w[n] + 1.5 * a[n] @ b[n] for n in range(num)])
    if is_dora:
        expected = np.stack(
            [
                np.stack([m[n, c] * x[:, c] / np.sqrt(x[:, c] @ x[:, c]) for c in range(o)], 1)
                for n, x in enumerate(expected)
            ]
        )
    shaped = {"a": a.reshape(*own, *inputs, r), "b": b.reshape(*own, r, *outputs), "m": m.reshape(*own, *outputs)}
    adapter = {name: jnp.float32(x) for name, x in shaped.items() if name != "m" or is_dora}
    found = merged(jnp.float32(w.reshape(*own, *inputs, *outputs)), adapter, Axes(len(inputs), len(outputs)), 1.5)
    assert relative(found, expected.reshape(found.shape)) < 1e-6


def loss_of(lm: Any, tokens: jax.Array) -> jax.Array:
    logits, _ = lm(tokens)
    return -jnp.mean(jax.nn.log_softmax(logits)[:, :-1] * jax.nn.one_hot(tokens[:, 1:], logits.shape[-1]))


@pytest.mark.parametrize("lora", LORAS, ids=["lora", "dora"])
def test_loss_and_gradients_are_those_of_the_merged_model_by_the_chain_rule(
    two_kinds: Config, rng: np.random.Generator, lora: LoRA
) -> None:
    """dA = s dW' B^T and dB = s A^T dW'; with DoRA of m / n dW', and dm = sum_i dW' V / n, the norm n held fixed."""
    config = with_lora(two_kinds, lora)
    params = drawn(config, rng)
    tokens = jnp.asarray(rng.integers(0, 264, (2, 12)))
    plain = merged_arrays(lora, params)
    (_, bind), (_, bind_plain) = build_trained(config), build(config.model, config.kernels)
    of_adapters = jax.jit(jax.value_and_grad(lambda x: loss_of(bind(base_of(params) | {ADAPTERS: x}), tokens)))
    loss, grads = of_adapters(params[ADAPTERS])
    plain_loss, plain_grads = jax.jit(jax.value_and_grad(lambda p: loss_of(bind_plain(p), tokens)))(plain)
    assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
    found, dense, before = adapters_of({ADAPTERS: grads}), by_path(plain_grads), by_path(base_of(params))
    adapters, scale = adapters_of(params), lora.alpha / lora.rank
    targets = targets_of(lora, params)
    assert len(targets) == 12
    for path, axes in targets.items():
        batch = before[path].ndim - sum(axes)

        def flat(x: Any, inputs: int, own: int = batch) -> np.ndarray:
            shape = x.shape
            middle = int(np.prod(shape[own : own + inputs]))
            return np.asarray(x, np.float64).reshape(int(np.prod(shape[:own])), middle, -1)

        w, dw = flat(before[path], axes.inputs), flat(dense[path], axes.inputs)
        a, b = flat(adapters[path]["a"], axes.inputs), flat(adapters[path]["b"], 1)
        if lora.dora:
            v, m = w + scale * a @ b, flat(adapters[path]["m"], axes.outputs).transpose(0, 2, 1)
            norm = np.sqrt((v * v).sum(axis=1, keepdims=True))
            expected_m = (dw * v / norm).sum(axis=1).reshape(found[path]["m"].shape)
            assert relative(found[path]["m"], expected_m) < 1e-5, path
            dw = dw * m / norm
        assert relative(flat(found[path]["a"], axes.inputs), scale * dw @ b.transpose(0, 2, 1)) < 1e-5, path
        assert relative(flat(found[path]["b"], 1), scale * a.transpose(0, 2, 1) @ dw) < 1e-5, path


def batches(config: Config, num: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, config.data.seq_len)
    text = [rng.integers(97, 100, (shape[0], shape[1] + 1), np.int32) for _ in range(num)]
    ones = np.ones(shape, np.int32)
    same = {"segment_ids": ones, "target_bytes": ones, "loss_weight": ones.astype(np.float32)}
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return [same | {"positions": positions, "tokens": t[:, :-1], "targets": t[:, 1:]} for t in text]


def steps(config: Config, num_devices: int = 1, num: int = 2) -> tuple[StepProgram, Any, Any, list[float]]:
    """The program, the state before the first step and after the last, and the losses."""
    mesh = make_mesh(config.sharding.mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        program = step_program(config, mesh)
        state = jax.jit(program.make_state)()
        before, losses = jax.device_get(state), []
        for batch in batches(config, num):
            state, metrics = program.step(state, jax.device_put(batch, program.rows))
            losses.append(float(metrics["loss"]))
        return program, before, jax.device_get(state), losses


def test_what_is_frozen_stays_bit_for_bit_and_has_no_optimizer_state(one_kind: Config) -> None:
    config = with_lora(one_kind, LoRA(rank=3), trained=("norm.*",))
    _, before, after, losses = steps(config)
    old, new = by_path(before.params), by_path(after.params)
    changed = {path for path in new if not np.array_equal(old[path], new[path])}
    adapters = {path for path in new if path.startswith(ADAPTERS)}
    # B is 0, so A has no gradient at the first step; at the second it has.
    assert changed == adapters | {"norm.scale"}
    moments = [path for path in by_path(after.opt_state) if ".mu." in f".{path}."]
    assert {path.partition(".mu.")[2] for path in moments} == adapters | {"norm.scale"}
    shapes = {path.partition(".mu.")[2]: x.shape for path, x in by_path(after.opt_state).items() if ".mu." in path}
    assert shapes == {path: new[path].shape for path in (*adapters, "norm.scale")}
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [
        (Mesh(data=1, fsdp=2), 2),
        (Mesh(data=1, fsdp=2, tensor=2), 4),
        pytest.param(Mesh(data=1, context=2, tensor=2), 4, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "fsdp-tensor", "context-tensor"],
)
def test_meshes_change_nothing(one_kind: Config, mesh: Mesh, num_devices: int) -> None:
    config = with_lora(one_kind, LoRA(rank=2, dora=True))
    alone = steps(config)[-1]
    spread = steps(replace(config, sharding=replace(config.sharding, mesh=mesh)), num_devices)[-1]
    assert spread == pytest.approx(alone, rel=2e-6)
