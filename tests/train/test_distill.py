"""Training on a teacher's probabilities: what is learned, what is sampled, and that going on changes nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybridlm import config_io
from hybridlm.config import (
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Distill,
    Eval,
    GeGLU,
    Mesh,
    Model,
    Train,
)
from hybridlm.config_check import ConfigError
from hybridlm.flops import forward_flops
from hybridlm.generate import Sampler
from hybridlm.model import build
from hybridlm.sharding import make_mesh, spec
from hybridlm.train.checkpoint import abstract_state
from hybridlm.train.derived import read_params
from hybridlm.train.distill import OF_BATCHES, SAMPLING, Distillation, before_the_end, row_keys
from hybridlm.train.loop import train
from hybridlm.train.preemption import StopRequest
from hybridlm.train.step import init_state, make_train_step

ROWS, LENGTH, PROMPT, VOCAB, END = 4, 12, 5, 20, 3
BLOCK = Block(mixer=Attention(num_heads=2, num_kv_heads=1, window=6), ffn=GeGLU(hidden=8))
MODEL = Model(vocab_size=VOCAB, width=8, num_layers=1, pattern=(BLOCK,))
TEACHER = replace(MODEL, num_layers=2, tied_embedding=False)
CONFIG = Config(model=MODEL)
INIT, BIND = build(MODEL, CONFIG.kernels)
TEACHER_INIT, BIND_TEACHER = build(TEACHER, CONFIG.kernels)
Invoke = Callable[..., Any]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def distillation(**options: Any) -> Distillation:
    return Distillation(Distill(teacher="", prompt_length=PROMPT, **options), BIND_TEACHER, VOCAB - 2, END, seed=7)


def drawn_params(init: Any, seed: int) -> Any:
    """Larger than at the start of training, so that probabilities differ."""
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: np.float32(0.5) * draw(x.shape, np.float32), shapes)


def make_batch(seed: int) -> dict[str, Any]:
    """Two documents in row 1; row 3 is padding from its fourth token on."""
    rng = np.random.default_rng(seed)
    ids = np.ones((ROWS, LENGTH), np.int32)
    ids[1, 3:], ids[3, 3:] = 2, 0
    positions = np.where(ids == 2, np.arange(LENGTH) - 3, np.arange(LENGTH)) * (ids != 0)
    return {
        "tokens": rng.integers(0, VOCAB, ids.shape).astype(np.int32) * (ids != 0),
        "targets": rng.integers(0, VOCAB, ids.shape).astype(np.int32),
        "segment_ids": ids,
        "positions": positions.astype(np.int32),
        "target_bytes": np.ones_like(ids),
        "loss_weight": (ids != 0).astype(np.float32),
    }


@pytest.fixture(scope="module")
def sampled() -> dict[str, np.ndarray]:
    """`make_batch(0)` with what the student goes on with at step 3."""
    params = drawn_params(INIT, 1)
    make = jax.jit(lambda params, batch: distillation(on_policy=1.0).batch(BIND(params), batch, jnp.int32(3)))
    return jax.device_get(make(params, make_batch(0)))


def test_sampled_tokens_are_those_of_generation_with_the_same_keys(sampled: dict[str, np.ndarray]) -> None:
    batch, num = make_batch(0), LENGTH - PROMPT + 1
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 3), OF_BATCHES)
    keys = np.asarray(jax.random.key_data(row_keys(key, ROWS)))
    starts = [0, 3, 0, 0]  # of the document that each row's prompt ends in
    rows = [batch["tokens"][i, start:PROMPT] for i, start in enumerate(starts)]
    tokens = np.stack(list(Sampler(BIND, VOCAB - 2, SAMPLING)(drawn_params(INIT, 1), rows, keys, num)), axis=1)
    kept = sampled["loss_weight"] > 0
    assert kept[:3].any(axis=1).all() and not kept[3].any() and not kept[:, : PROMPT - 1].any()
    for i in range(3):
        length = kept[i].sum()
        assert length == num or tokens[i, length - 1] == END
        assert END not in tokens[i, : length - 1]
        np.testing.assert_array_equal(sampled["targets"][i, kept[i]], tokens[i, :length])
        np.testing.assert_array_equal(sampled["tokens"][i, PROMPT : PROMPT + length - 1], tokens[i, : length - 1])
    np.testing.assert_array_equal(sampled["tokens"][:, :PROMPT], batch["tokens"][:, :PROMPT])
    np.testing.assert_array_equal(sampled["sampled"], sampled["loss_weight"])


def test_sampled_documents_go_on_where_the_prompt_ends(sampled: dict[str, np.ndarray]) -> None:
    batch = make_batch(0)
    for i in range(3):
        length = int(sampled["loss_weight"][i].sum())
        of_drawn = slice(PROMPT, PROMPT + length - 1)
        assert (sampled["segment_ids"][i, of_drawn] == batch["segment_ids"][i, PROMPT - 1]).all()
        want = batch["positions"][i, PROMPT - 1] + 1 + np.arange(length - 1)
        np.testing.assert_array_equal(sampled["positions"][i, of_drawn], want)
        assert not sampled["segment_ids"][i, PROMPT + length - 1 :].any()


def test_a_row_ends_with_its_first_end_of_document() -> None:
    drawn = jnp.asarray([[1, END, 2, END], [END, 1, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(before_the_end(drawn, END), [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_the_share_of_sampled_batches_is_as_asked_for_and_depends_on_the_step_alone() -> None:
    params, batch = jax.device_put((drawn_params(INIT, 1), make_batch(0)))
    make = jax.jit(lambda step: distillation(on_policy=0.3).batch(BIND(params), batch, step)["sampled"].max())
    chosen = [float(make(jnp.int32(step))) for step in range(200)]
    assert 0.2 < np.mean(chosen) < 0.4
    assert chosen[:20] == [float(make(jnp.int32(step))) for step in range(20)]


def step_of(cfg: Distillation, train: Train, params: Any, teacher: Any) -> Any:
    """Parameters after step 3 from `params` with the gradient for an update, and the metrics."""
    optimizer = optax.sgd(1.0)
    run = make_train_step(BIND, optimizer, lambda _: 1.0, train, distillation=cfg)
    state = jax.jit(partial(init_state, INIT, optimizer, 0))()
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params)
    batch = jax.device_put(make_batch(0))
    if not jax.sharding.get_abstract_mesh().empty:
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, spec("sequences", "time")), batch)
    state, metrics = run(state._replace(step=state.step + 3, params=params), batch, teacher)
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.parametrize("on_policy", [0.0, 1.0])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(on_policy: float) -> None:
    params = drawn_params(INIT, 1)
    cfg = replace(distillation(on_policy=on_policy, loss="jsd"), bind_teacher=BIND)
    after, metrics = step_of(cfg, Train(batch_size=ROWS), params, params)
    assert abs(metrics["divergence"]) < 1e-6 and metrics["grad_norm"] < 1e-5
    assert metrics["hard_loss"] > 1
    assert np.isnan(metrics["bits_per_byte"]) == bool(on_policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, params)


def test_the_gradient_is_that_of_the_divergence_and_the_hard_loss_from_whole_logits() -> None:
    params, teacher, batch = drawn_params(INIT, 1), drawn_params(TEACHER_INIT, 2), make_batch(0)
    cfg = distillation(loss="reverse_kl", temperature=2.0, hard_weight=0.25)
    teacher, batch = jax.device_put((teacher, batch))
    after, metrics = step_of(cfg, Train(batch_size=ROWS), params, teacher)

    def objective(params: Any) -> Any:
        y, z = (
            bind(p)(batch["tokens"], batch["segment_ids"])[0] for bind, p in ((BIND, params), (BIND_TEACHER, teacher))
        )
        q, p = jax.nn.log_softmax(y / 2.0), jax.nn.log_softmax(z / 2.0)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(y), batch["targets"][..., None], axis=-1)[..., 0]
        value = 0.75 * 4.0 * jnp.sum(jnp.exp(q) * (q - p), axis=-1) + 0.25 * nll
        return jnp.sum(value * batch["loss_weight"]) / np.sum(batch["loss_weight"])

    value, grads = jax.jit(jax.value_and_grad(objective))(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    for a, b, g in zip(*map(jax.tree.leaves, (params, after, grads)), strict=True):
        np.testing.assert_allclose(a - b, g, rtol=1e-3, atol=1e-5)


def test_microbatches_equal_the_whole_batch() -> None:
    params, teacher = drawn_params(INIT, 1), drawn_params(TEACHER_INIT, 2)
    for on_policy in (0.0, 1.0):
        cfg = distillation(on_policy=on_policy, hard_weight=0.5)
        whole, parts = (step_of(cfg, Train(batch_size=ROWS, num_microbatches=m), params, teacher)[0] for m in (1, 2))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), parts, whole)


def test_on_a_mesh_it_draws_and_learns_the_same() -> None:
    params, teacher = drawn_params(INIT, 1), drawn_params(TEACHER_INIT, 2)
    cfg, options = distillation(on_policy=1.0, loss="jsd"), Train(batch_size=ROWS)
    want, metrics = step_of(cfg, options, params, teacher)
    with jax.set_mesh(mesh := make_mesh(Mesh(data=2, fsdp=2, tensor=2))):
        layout = abstract_state(lambda: TEACHER_INIT(jax.random.key(0)), mesh)
        teacher = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), teacher, layout)
        got, metrics_on_mesh = step_of(cfg, options, params, teacher)
    np.testing.assert_allclose(metrics_on_mesh["divergence"], metrics["divergence"], rtol=1e-5)
    assert metrics_on_mesh["batch_tokens"] == metrics["batch_tokens"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.fixture(scope="module")
def student(tiny_config: Config, trained_run: Path) -> Config:
    """Half of whose batches are its own."""
    return replace(
        tiny_config,
        model=replace(tiny_config.model, num_layers=1, pattern=(BLOCK,)),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=1)),
        train=replace(tiny_config.train, steps=10),
        eval=Eval(every=100, batches=1),
        checkpoint=Checkpoint(every=4),
        distill=Distill(teacher=str(trained_run), on_policy=0.3, prompt_length=8),
    )


@pytest.fixture(scope="module")
def distilled(student: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "distilled"
    assert train(student, directory) == 0
    return directory


def test_a_student_comes_nearer_to_its_teacher(distilled: Path, student: Config) -> None:
    seen = records(distilled)
    assert {record["sampled"] for record in seen} == {0.0, 1.0}
    assert all((record["bits_per_byte"] is None) == bool(record["sampled"]) for record in seen)
    of_text = [record["divergence"] for record in seen if not record["sampled"]]
    assert of_text[-1] < of_text[0] / 2
    assert config_io.load_run_config(distilled).distill == replace(student.distill, teacher_step=12)


def test_a_run_that_was_stopped_goes_on_bit_by_bit_though_its_teacher_has_been_trained_on(
    distilled: Path, student: Config, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = shutil.copytree(trained_run, tmp_path / "teacher")
    config = replace(student, distill=replace(student.distill, teacher=str(teacher)))
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda self, step: step == 5)
        assert train(config, tmp_path / "run") == 75
    shutil.copytree(teacher / "checkpoints" / "8", teacher / "checkpoints" / "16")
    assert train(config, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(distilled)
    mine, theirs = (read_params(run, student) for run in (tmp_path / "run", distilled))
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)


@pytest.mark.slow
def test_the_command_is_training_with_a_teacher(
    invoke: Invoke, distilled: Path, student: Config, trained_run: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "student.json"
    config_io.dump_json(replace(student, distill=None), recipe)
    options = ("--distill.on_policy=0.3", "--distill.prompt-length=8")
    code, out, err = invoke("distill", recipe, "--teacher", trained_run, "--out", tmp_path / "run", *options)
    assert code == 0, err
    assert losses(tmp_path / "run") == losses(distilled)
    assert json.loads((tmp_path / "run/config.json").read_text())["distill"]["teacher_step"] == 12


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--teacher", "nowhere"), ("distill.teacher=nowhere: no such run directory",)),
        ((), ("--teacher: is required",)),
        (("--teacher", "{teacher}", "--model.vocab_size=300"), ("model.vocab_size=300: the teacher has 264",)),
        (("--teacher", "{teacher}", "--distill.teacher_step=5"), ("holds no checkpoint of step 5", "4, 8, 12")),
        (("--teacher", "{teacher}", "--distill.beta=0", "--distill.loss=jsd"), ("distill.beta=0.0: must be above 0",)),
        (("--teacher", "{teacher}", "--distill.on_policy=1", "--data.seq_len=32"), ("distill.prompt_length=32",)),
        (("--teacher", "{out}"), ("distill.teacher={out}: ",)),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    invoke: Invoke, student: Config, trained_run: Path, tmp_path: Path, options: Any, parts: Any
) -> None:
    recipe, out = tmp_path / "student.json", tmp_path / "run"
    config_io.dump_json(replace(student, distill=None), recipe)
    names = {"teacher": trained_run, "out": out}
    words = [option.format(**names) for option in options]
    invoke("distill", recipe, "--out", out, *words).assert_refused(*(part.format(**names) for part in parts))
    assert not out.exists()


def test_a_plan_holds_the_teacher_and_counts_its_work(student: Config, trained_run: Path) -> None:
    from hybridlm.plan.compile import compile_step
    from hybridlm.plan.report import make_report
    from hybridlm.plan.text import describe
    from hybridlm.plan.topology import topology

    planned = compile_step(replace(student, distill=Distill(teacher=str(trained_run))), topology("cpu:1"))
    teacher, _ = read_params(trained_run, config_io.load_run_config(trained_run))
    report = make_report(planned)
    assert report.memory.teacher == sum(x.nbytes for x in jax.tree.leaves(teacher))
    assert report.model_flops == distilled_flops(student, trained_run)
    assert "  teacher  " in describe("student", report)


def distilled_flops(student: Config, trained_run: Path) -> int:
    """Of a step: three times the student's forward pass, and the teacher's once."""
    model, length = config_io.load_run_config(trained_run).model, student.data.seq_len
    per_token = 3 * forward_flops(student.model, length) + forward_flops(model, length)
    return per_token * length * student.train.batch_size


def test_a_plan_is_refused_where_training_would_be(student: Config) -> None:
    from hybridlm.plan.compile import compile_step
    from hybridlm.plan.topology import topology

    other = replace(student, model=replace(student.model, vocab_size=300))
    with pytest.raises(ConfigError, match="model.vocab_size=300: the teacher has 264"):
        compile_step(other, topology("cpu:1"))


def test_cut_sequences_are_refused(student: Config, tmp_path: Path) -> None:
    cut = replace(student, sharding=replace(student.sharding, mesh=Mesh(data=1, context=8)))
    with pytest.raises(ConfigError, match=r"distill.on_policy=0.3: sampling needs whole sequences"):
        train(cut, tmp_path / "run")
