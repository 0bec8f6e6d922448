"""Samples while training: the same text on every mesh and with several processes, each line once."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import Config, Eval, Mesh
from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import ByteTokenizer
from hybridlm.generate import Sampling, generate
from hybridlm.model import build
from hybridlm.model.compiled import Model
from hybridlm.sharding import make_mesh
from hybridlm.train import loop, samples
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.metrics import RunLog
from hybridlm.train.preemption import StopRequest
from hybridlm.train.samples import Samples, decoding_mesh

PROMPTS = ("the cat", "", "a dog ran. one bird sang. the")
NUM = 11


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_prompts(config: Config, prompts: Sequence[str] = PROMPTS, every: int = 6) -> Config:
    return replace(config, eval=Eval(every=every, batches=1, sample_prompts=tuple(prompts), sample_tokens=NUM))


@pytest.fixture(scope="module")
def sampled_config(tiny_config: Config) -> Config:
    return with_prompts(tiny_config)


@pytest.fixture(scope="module")
def sampled_run(sampled_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "sampled"
    assert loop.train(sampled_config, directory) == 0
    return directory


def parameters(config: Config) -> Any:
    """Whole arrays, large enough that what comes next is clear."""
    init, _ = build(config.model, config.kernels)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: np.float32(0.3) * draw(x.shape, np.float32), shapes)


def on_mesh(config: Config, **sizes: int) -> list[str]:
    """What the prompts go on with on a mesh of so many devices."""
    num_devices = int(np.prod(list(sizes.values())))
    mesh = make_mesh(Mesh(**{"data": 1, **sizes}), jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        init, bind = build(config.model, config.kernels)
        layout = jax.tree.map(lambda x: x.sharding, abstract_state(lambda: init(jax.random.key(0)), mesh))
        params = jax.device_put(parameters(config), layout)
        records = Samples(config, mesh, bind, ByteTokenizer())(params, 7)
    assert [(record["step"], record["prompt"]) for record in records] == [(7, p) for p in config.eval.sample_prompts]
    return [record["text"] for record in records]


def on_one_device(config: Config) -> list[str]:
    """By `hybridlm generate`'s own loop, greedily, prompt by prompt."""
    _, bind = build(config.model, config.kernels)
    model, tokenizer = Model(parameters(config), bind), ByteTokenizer()
    greedy = Sampling(temperature=0.0)
    return [
        tokenizer.decode(generate(model, tokenizer, prompt.encode(), max_new_tokens=NUM, sampling=greedy))
        for prompt in config.eval.sample_prompts
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 2, "context": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 8}, marks=pytest.mark.slow),
        pytest.param({"context": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_goes_on_as_one_device_does(
    sampled_config: Config, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SAMPLING", Sampling(temperature=0.0))
    expected = on_one_device(sampled_config)
    assert len(set(expected)) == len(PROMPTS)
    assert on_mesh(sampled_config, **sizes) == expected


@pytest.mark.slow
def test_experts_on_a_mesh_that_cuts_time_go_on_as_on_one_device(
    moe_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "SAMPLING", Sampling(temperature=0.0))
    config = with_prompts(moe_config)
    assert on_mesh(config, expert=2, context=2, fsdp=2) == on_one_device(config)


def test_draws_are_the_same_on_every_mesh(sampled_config: Config) -> None:
    drawn = on_mesh(sampled_config, data=1)
    assert on_mesh(sampled_config, fsdp=2, context=2) == drawn


def test_a_run_writes_what_its_checkpoint_goes_on_with(sampled_run: Path, sampled_config: Config) -> None:
    written = lines(sampled_run / "samples.jsonl")
    assert [(r["step"], r["prompt"]) for r in written] == [(step, p) for step in (6, 12) for p in PROMPTS]
    mesh = make_mesh(Mesh(), jax.devices()[:1])
    init, bind = build(sampled_config.model, sampled_config.kernels)
    with (
        jax.set_mesh(mesh),
        Checkpoints(sampled_run / "checkpoints", sampled_config.model, sampled_config.checkpoint) as checkpoints,
    ):
        params = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        again = Samples(sampled_config, mesh, bind, ByteTokenizer())
        assert again(params, 12) == written[len(PROMPTS) :]
        # Another step draws anew.
        assert [r["text"] for r in again(params, 13)] != [r["text"] for r in again(params, 12)]


def test_samples_change_nothing_that_is_learnt(sampled_run: Path, trained_run: Path) -> None:
    mine, theirs = (lines(run / "metrics.jsonl") for run in (sampled_run, trained_run))
    assert [record["loss"] for record in mine] == [record["loss"] for record in theirs]


def test_a_finished_run_adds_no_samples_but_of_new_prompts(
    sampled_run: Path, sampled_config: Config, tmp_path: Path
) -> None:
    run = shutil.copytree(sampled_run, tmp_path / "run")
    before = (run / "samples.jsonl").read_text()
    assert loop.train(sampled_config, run) == 0
    assert (run / "samples.jsonl").read_text() == before
    assert loop.train(with_prompts(sampled_config, ("one bird", "the cat")), run) == 0
    added = (run / "samples.jsonl").read_text().removeprefix(before)
    assert [json.loads(line)["prompt"] for line in added.splitlines()] == ["one bird"]


def test_a_resumed_run_writes_the_samples_that_were_due_each_once(
    sampled_run: Path, sampled_config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda self, step: step == 6)
        assert loop.train(sampled_config, run) == 75
    assert not (run / "samples.jsonl").exists()  # due, but the run was asked to stop
    whole = (sampled_run / "samples.jsonl").read_text()
    first, *_, last = whole.splitlines(keepends=True)
    # As a crash might leave it: one line of step 6, one of a step that is run again, one cut short.
    (run / "samples.jsonl").write_text(first + last + last[:20])
    assert loop.train(sampled_config, run) == 0
    assert (run / "samples.jsonl").read_text() == whole


def test_prompts_that_are_alike_have_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("a", "b", "a")
    records = [{"step": 3, "prompt": prompt, "text": f"{i}\n"} for i, prompt in enumerate(prompts)]
    for written in range(len(prompts)):
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:written]))
        with RunLog(tmp_path, 3, 5) as log:
            assert not log.sampled(3, prompts)
            log.samples(3, records)
            assert log.sampled(3, prompts)
        assert lines(tmp_path / "samples.jsonl") == records
    assert capsys.readouterr().out.splitlines()[-1] == r"step 3: 'a' goes on '2\n'"


def test_a_prompt_that_is_not_text_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^sample_prompts\.1: is not UTF-8 at character 2"):
        Eval(sample_prompts=("fine", "ab\udcff"))


def test_of_the_mesh_context_counts_to_fsdp_and_devices_stay_in_order() -> None:
    mesh = make_mesh(Mesh(data=1, fsdp=2, context=2, tensor=2), jax.devices())
    decoding = decoding_mesh(mesh)
    assert {axis: size for axis, size in decoding.shape.items() if size > 1} == {"fsdp": 4, "tensor": 2}
    assert decoding.devices.ravel().tolist() == mesh.devices.ravel().tolist()
    uncut = make_mesh(Mesh(data=4, tensor=2), jax.devices())
    assert decoding_mesh(uncut) is uncut


@pytest.mark.slow
def test_two_processes_write_what_one_writes(sampled_config: Config, start: Any, tmp_path: Path) -> None:
    mesh = ("sharding.mesh.data=1", "sharding.mesh.fsdp=2", "sharding.mesh.context=2")
    config_io.dump_json(config_io.override(sampled_config, mesh), tmp_path / "config.json")
    for processes in (1, 2):
        ended = start(processes, 4 // processes, tmp_path / "config.json", "--out", tmp_path / str(processes)).ended()
        assert [process.code for process in ended] == [0] * processes, ended[0].err
        assert sum("goes on" in process.out for process in ended) == 1
    written = lines(tmp_path / "2" / "samples.jsonl")
    assert [(r["step"], r["prompt"]) for r in written] == [(step, p) for step in (6, 12) for p in PROMPTS]
    assert written == lines(tmp_path / "1" / "samples.jsonl")
