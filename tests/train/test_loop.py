"""Whole runs: what they write, and that stopping, killing, moving and going on change nothing that they learn."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import Config, Mesh, Part, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.sharding import make_mesh
from hybridlm.train import loop
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.directory import unchangeable, without_secrets
from hybridlm.train.loop import train
from hybridlm.train.metrics import JsonLines
from hybridlm.train.preemption import StopRequest
from hybridlm.train.step import init_state


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in lines(run / "metrics.jsonl")}


def final_state(config: Config, run: Path) -> list[np.ndarray]:
    """Every array of the latest checkpoint: parameters, optimizer, counters."""
    init, _ = build(config.model, config.kernels)
    optimizer, _ = make_optimizer(config.optimizer, config.train.steps)
    mesh = make_mesh(Mesh())
    with jax.set_mesh(mesh), Checkpoints(run / "checkpoints", config.model, config.checkpoint) as checkpoints:
        assert checkpoints.latest_step() == config.train.steps
        abstract = abstract_state(partial(init_state, init, optimizer, config.train.seed), mesh)
        state, _ = checkpoints.restore(abstract)
        return [np.asarray(x) for x in jax.tree.leaves(state)]


def assert_same_run(config: Config, run: Path, undisturbed: Path) -> None:
    assert losses(run) == losses(undisturbed)
    assert list(losses(run)) == list(range(1, config.train.steps + 1))
    assert [r["loss"] for r in lines(run / "eval.jsonl")] == [r["loss"] for r in lines(undisturbed / "eval.jsonl")]
    for mine, theirs in zip(final_state(config, run), final_state(config, undisturbed), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def stopped_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that was asked to stop at step 5 of 12."""
    directory = tmp_path_factory.mktemp("runs") / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequest, "at", lambda self, step: step == 5)
        assert train(tiny_config, directory) == 75
    return directory


@pytest.fixture
def copy_of_stopped(stopped_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped_run, tmp_path / "run")


@pytest.fixture
def copy_of_trained(trained_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained_run, tmp_path / "run")


def test_a_run_learns(trained_run: Path) -> None:
    seen = losses(trained_run)
    assert seen[1] == pytest.approx(np.log(264), rel=0.1)
    assert seen[12] < seen[1] - 2
    evaluated = lines(trained_run / "eval.jsonl")
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]


def test_metrics_hold_what_is_documented(trained_run: Path, tiny_config: Config) -> None:
    records = lines(trained_run / "metrics.jsonl")
    fields = "step tokens loss bits_per_byte grad_norm lr tokens_per_second mfu step_time_s".split()
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["tokens"] for record in records] == [step * 8 * 32 for step in range(1, 13)]
    for record in records:
        assert set(fields) <= set(record)
        assert record["tokens_per_second"] == pytest.approx(8 * 32 / record["step_time_s"])
        assert 0 < record["mfu"] < 1
    assert [record["step"] for record in lines(trained_run / "eval.jsonl")] == [6, 12]
    assert config_io.load_json(trained_run / "config.json") == tiny_config
    environment = json.loads((trained_run / "environment.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__


def test_a_stopped_run_goes_on_bitwise(
    copy_of_stopped: Path, tiny_config: Config, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(losses(copy_of_stopped)) == [1, 2, 3, 4, 5]
    assert train(tiny_config, copy_of_stopped) == 0
    assert "resumed from step 5" in capsys.readouterr().out
    assert_same_run(tiny_config, copy_of_stopped, trained_run)


KILLED_WHILE_SAVING = """
import os, signal, sys
from hybridlm.cli import main
from hybridlm.train.checkpoint import Checkpoints
save = Checkpoints.save
def save_and_die(self, step, *parts):
    save(self, step, *parts)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoints.save = save_and_die
main()
"""


def test_a_run_killed_while_saving_goes_on_bitwise(
    tiny_config: Config, trained_run: Path, tmp_path: Path, process_environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, "train", str(trained_run / "config.json"), "--out", str(run)]
    process = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (run / "checkpoints" / "12").exists()
    assert train(tiny_config, run) == 0
    assert_same_run(tiny_config, run, trained_run)


@pytest.mark.parametrize("sizes", [(2, 2, 2), pytest.param((1, 1, 1), marks=pytest.mark.slow)])
def test_a_run_moves_to_another_mesh(
    copy_of_stopped: Path,
    tiny_config: Config,
    trained_run: Path,
    sizes: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, fsdp, tensor = sizes
    devices = jax.devices()[: data * fsdp * tensor]
    monkeypatch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, devices))
    moved = replace(tiny_config, sharding=Sharding(mesh=Mesh(data=data, fsdp=fsdp, tensor=tensor)))
    assert train(moved, copy_of_stopped) == 0
    mine, theirs = losses(copy_of_stopped), losses(trained_run)
    assert list(mine) == list(theirs)
    # float32 sums in another order, through seven AdamW updates.
    assert max(abs(mine[step] - theirs[step]) for step in theirs) < 1e-5 * theirs[1]


def test_a_finished_run_says_so_and_adds_nothing(
    copy_of_trained: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("metrics.jsonl", "eval.jsonl", "config.json")
    before = [(copy_of_trained / name).read_bytes() for name in files]
    assert train(tiny_config, copy_of_trained) == 0
    assert "finished already: step 12 of 12" in capsys.readouterr().out
    assert [(copy_of_trained / name).read_bytes() for name in files] == before


def test_a_finished_run_goes_on_when_given_more_steps(copy_of_trained: Path, tiny_config: Config) -> None:
    before = losses(copy_of_trained)
    longer = replace(tiny_config, train=replace(tiny_config.train, steps=14))
    assert train(longer, copy_of_trained) == 0
    after = losses(copy_of_trained)
    assert list(after) == list(range(1, 15))
    assert before.items() <= after.items()
    assert [record["step"] for record in lines(copy_of_trained / "eval.jsonl")] == [6, 12, 14]
    assert config_io.load_json(copy_of_trained / "config.json") == longer


def test_fresh_refuses_a_run_that_is_there(trained_run: Path, tiny_config: Config) -> None:
    with pytest.raises(ConfigError, match="--fresh refuses to resume; choose another --out"):
        train(tiny_config, trained_run, fresh=True)


@pytest.mark.parametrize(
    ("assignment", "change"),
    [
        ("model.width=32", "model.width: 16 -> 32"),
        ("model.pattern.1.mixer.window=4", "model.pattern.1.mixer.window: 8 -> 4"),
        ("train.batch_size=16", "train.batch_size: 8 -> 16"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr: 0.01 -> 0.5"),
    ],
)
def test_a_run_of_another_config_is_refused(
    trained_run: Path, tiny_config: Config, assignment: str, change: str
) -> None:
    before = (trained_run / "config.json").read_bytes()
    with pytest.raises(ConfigError) as refusal:
        train(config_io.override(tiny_config, [assignment]), trained_run)
    assert f"holds a run of another config ({change})" in str(refusal.value)
    assert (trained_run / "config.json").read_bytes() == before


def test_the_parts_of_a_mixture_may_lie_elsewhere_and_weigh_the_same(tiny_config: Config) -> None:
    assign = "data.mixture.{}.{}={}".format
    parts = tuple(Part(name=name, source="text", path=name, weight=1) for name in ("web", "code"))
    mixed = replace(tiny_config, data=replace(tiny_config.data, path=None, mixture=parts))
    assert unchangeable(mixed, config_io.override(mixed, [assign(1, "path", "/data/code")])) == []
    heavier = config_io.override(mixed, [assign(1, "path", "/data/code"), assign(1, "weight", 2)])
    assert unchangeable(mixed, heavier) == ["data.mixture.1.weight: 1 -> 2.0"]


def test_other_text_is_refused_and_the_run_left_as_it_was(
    copy_of_trained: Path, tiny_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("Something else entirely. " * 40)
    other = config_io.override(tiny_config, [f"data.path={tmp_path / 'other.txt'}"])
    before = (copy_of_trained / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="was trained on other text or with another tokenizer"):
        train(other, copy_of_trained)
    assert (copy_of_trained / "config.json").read_bytes() == before


def test_too_many_steps_that_are_not_finite_stop_the_run(tiny_config: Config, tmp_path: Path) -> None:
    exploding = config_io.override(
        tiny_config, ["optimizer.peak_lr=1e30", "train.max_nonfinite_steps=3", "train.rollbacks=0"]
    )
    with pytest.raises(FloatingPointError, match=r"not finite 3 times in a row .* lower optimizer.peak_lr"):
        train(exploding, tmp_path / "run")
    records = lines(tmp_path / "run" / "metrics.jsonl")
    assert records[-1]["grad_norm"] is None
    assert records[-1]["nonfinite_in_a_row"] == 3


def test_a_line_cut_short_by_a_crash_is_left_out(copy_of_stopped: Path, tiny_config: Config, trained_run: Path) -> None:
    with (copy_of_stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert train(tiny_config, copy_of_stopped) == 0
    assert losses(copy_of_stopped) == losses(trained_run)


def test_a_full_log_disk_stops_the_run_and_spoils_no_checkpoint(
    tiny_config: Config, tmp_path: Path, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = JsonLines.append

    def full_from_step_five(self: JsonLines, record: dict[str, Any]) -> None:
        if record["step"] >= 5:
            raise OSError(f"{self.path}: cannot be written: No space left on device")
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "append", full_from_step_five)
        with pytest.raises(OSError, match="metrics.jsonl: cannot be written"):
            train(tiny_config, tmp_path / "run")
    assert train(tiny_config, tmp_path / "run") == 0
    assert_same_run(tiny_config, tmp_path / "run", trained_run)


def test_secrets_on_the_command_line_are_not_written_down() -> None:
    words = "train x --hub.token=abc --api-key def --data.text-key=body --data.tokenizer=byte HF_TOKEN=ghi --fresh"
    words += " --data.path=https://me:pw@host/file?signature=jkl --model.num-kv-heads=2 part-??.txt"
    assert without_secrets(words.split()) == [
        *("train", "x", "--hub.token=[redacted]", "--api-key", "[redacted]", "--data.text-key=body"),
        *("--data.tokenizer=byte", "HF_TOKEN=[redacted]", "--fresh"),
        *("--data.path=https://[redacted]@host/file?[redacted]", "--model.num-kv-heads=2", "part-??.txt"),
    ]
