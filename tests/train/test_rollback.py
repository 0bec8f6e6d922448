"""Batches that spoil a step are passed over; many in a row, and the run goes back and jumps over them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.data.pipeline import Batches
from hybridlm.sharding import make_mesh
from hybridlm.train import loop
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.preemption import StopRequest
from hybridlm.train.program import step_program
from hybridlm.train.step import TrainState

Poison = Callable[[Collection[int]], None]
Skip = Callable[[int, int], None]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(run / "metrics.jsonl")]


def happened(run: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in records(run / "events.jsonl") if record["event"] == event]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.fixture(scope="module")
def small(tiny_config: Config) -> Config:
    """12 steps of one block, a checkpoint each 4, kept all; three rejected steps in a row are too many."""
    model = replace(tiny_config.model, num_layers=1, pattern=tiny_config.model.pattern[:1])
    return replace(
        tiny_config,
        model=model,
        train=replace(tiny_config.train, max_nonfinite_steps=3),
        eval=replace(tiny_config.eval, batches=1),
        checkpoint=replace(tiny_config.checkpoint, keep=9),
    )


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:2]))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """`poison(numbers)`: the gradients of these batches are NaN, however often they are handed out."""

    def hand_out_poisoned(numbers: Collection[int]) -> None:
        hand_out = Batches.__next__

        def poisoned(self: Batches) -> Any:
            batch = hand_out(self)
            return batch | {"loss_weight": batch["loss_weight"] * np.nan} if self.position in numbers else batch

        monkeypatch.setattr(Batches, "__next__", poisoned)

    return hand_out_poisoned


@pytest.fixture
def never_shown(monkeypatch: pytest.MonkeyPatch) -> Skip:
    """`never_shown(first, last)`: runs that do not know these batches."""

    def skip(first: int, last: int) -> None:
        restored = loop.Run.restored

        def without(self: loop.Run) -> TrainState:
            state = restored(self)
            self.batches.skip(first, last)
            return state

        monkeypatch.setattr(loop.Run, "restored", without)

    return skip


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StopRequest, "at", lambda self, at: at == step)


def state_of(config: Config, run: Path) -> TrainState:
    """That of the latest checkpoint."""
    mesh = make_mesh(config.sharding.mesh, jax.devices()[:2])
    with jax.set_mesh(mesh), Checkpoints(run / "checkpoints", config.model, config.checkpoint) as checkpoints:
        return checkpoints.restore(step_program(config, mesh).state)[0]


def assert_equal(mine: Any, theirs: Any) -> None:
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_bad_batch_leaves_no_trace(
    small: Config, tmp_path: Path, poison: Poison, never_shown: Skip, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        never_shown(5, 5)
        stop_at(11, patch)
        assert loop.train(small, tmp_path / "never") == 75
    monkeypatch.undo()
    monkeypatch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:2]))
    poison({5})
    assert loop.train(small, tmp_path / "run") == 0
    (skipped,) = happened(tmp_path / "run", "skipped")
    assert (skipped["step"], skipped["batch"]) == (6, 5)
    assert skipped["reason"] == "not finite: loss nan, gradient norm nan"
    mine, never = state_of(small, tmp_path / "run"), state_of(small, tmp_path / "never")
    assert (int(mine.step), int(never.step)) == (12, 11)
    assert_equal(
        (mine.params, mine.opt_state, mine.table_states, mine.recent),
        (never.params, never.opt_state, never.table_states, never.recent),
    )


@pytest.mark.parametrize(("first", "last", "back_to"), [(5, 7, 4), (1, 3, 0)])
def test_a_run_goes_back_and_jumps_over_bad_batches(
    small: Config,
    tmp_path: Path,
    poison: Poison,
    never_shown: Skip,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: int,
    last: int,
    back_to: int,
) -> None:
    with monkeypatch.context():
        never_shown(first, last)
        assert loop.train(small, tmp_path / "never") == 0
    monkeypatch.undo()
    monkeypatch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:2]))
    poison(range(first, last + 1))
    assert loop.train(small, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "never")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 13))
    assert_equal(state_of(small, tmp_path / "run"), state_of(small, tmp_path / "never"))
    (back,) = happened(tmp_path / "run", "rolled back")
    assert (back["step"], back["batches"], back["rejected"]) == (back_to, [first, last], [first + 1, last + 1])
    assert f"back to step {back_to}, and over batches {first} to {last}" in capsys.readouterr().out


def test_going_back_holds_one_state_at_a_time(
    small: Config, tmp_path: Path, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored, held = loop.Run.restored, []

    def count_before(self: loop.Run) -> TrainState:
        shapes = [x.shape for x in jax.tree.leaves(self.program.state.params)]
        largest = max(shapes, key=np.prod)
        held.append(sum(x.shape == largest for x in jax.live_arrays()))
        return restored(self)

    monkeypatch.setattr(loop.Run, "restored", count_before)
    poison({5, 6, 7})
    assert loop.train(small, tmp_path / "run") == 0
    before_the_run, going_back = held
    assert going_back <= before_the_run


def test_no_checkpoint_is_written_among_rejected_steps(small: Config, tmp_path: Path, poison: Poison) -> None:
    poison({6, 7})  # steps 7 and 8, after which one is due
    assert loop.train(small, tmp_path / "run") == 0
    assert saved_steps(tmp_path / "run") == [4, 9, 12]
    assert happened(tmp_path / "run", "rolled back") == []


def test_a_run_that_cannot_get_past_the_place_stops(small: Config, tmp_path: Path, poison: Poison) -> None:
    poison(range(5, 1000))
    with pytest.raises(FloatingPointError, match=r"not finite 3 times in a row .* going back to step 4 2 times; lower"):
        loop.train(small, tmp_path / "run")
    assert [back["batches"] for back in happened(tmp_path / "run", "rolled back")] == [[5, 7], [8, 10]]
    assert [record["step"] for record in happened(tmp_path / "run", "stopped")] == [8]
    assert saved_steps(tmp_path / "run") == [4]
    assert_equal(0, state_of(small, tmp_path / "run").nonfinite_total)


def test_what_was_jumped_over_stays_so_after_a_restart(
    small: Config, tmp_path: Path, poison: Poison, never_shown: Skip, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison({5, 6, 7})
    with monkeypatch.context() as patch:
        stop_at(9, patch)
        assert loop.train(small, tmp_path / "run") == 75
    assert loop.train(small, tmp_path / "run") == 0
    assert len(happened(tmp_path / "run", "rolled back")) == 1
    assert all(loss is not None for _, loss in losses(tmp_path / "run"))


@pytest.mark.parametrize("stopped", [6, 8])
def test_a_stop_among_rejected_steps_leaves_the_checkpoint_before_them(
    small: Config,
    tmp_path: Path,
    poison: Poison,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped: int,
) -> None:
    poison({5, 6, 7})
    with monkeypatch.context() as patch:
        stop_at(stopped, patch)
        assert loop.train(small, tmp_path / "run") == 75
    assert saved_steps(tmp_path / "run") == [4]
    said = f"stopped at step {stopped} of 12, not saved among rejected steps, but at step 4"
    assert said in capsys.readouterr().out
    assert happened(tmp_path / "run", "rolled back") == []
    assert loop.train(small, tmp_path / "run") == 0
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 13))


def test_an_evaluation_that_was_due_when_the_run_died_is_made_up_for(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate

    def die_at_the_last(*told: Any) -> dict[str, Any]:
        if int(told[-1]) == 12:
            raise RuntimeError("the machine is gone")
        return evaluate(*told)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", die_at_the_last)
        with pytest.raises(RuntimeError, match="gone"):
            loop.train(small, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [4, 8, 12]
    assert loop.train(small, tmp_path / "run") == 0
    assert [record["step"] for record in records(tmp_path / "run" / "eval.jsonl")] == [6, 12]


def test_devices_whose_copies_differ_end_the_run_unsaved(
    small: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def spoilt_at_six(state: TrainState) -> list[str]:
        asked.append(int(state.step))
        return ["params.norm.scale"] if asked[-1] == 6 else []

    monkeypatch.setattr(loop, "diverged_replicas", spoilt_at_six)
    comparing = replace(small, train=replace(small.train, compare_replicas_every=3))
    assert loop.train(comparing, tmp_path / "run") == 76
    assert asked == [3, 4, 6]  # before a checkpoint too
    assert saved_steps(tmp_path / "run") == [4]
    assert "step 6: the devices' copies of params.norm.scale differ" in capsys.readouterr().err


POISONED = """
import numpy as np
from hybridlm.data.pipeline import Batches
hand_out = Batches.__next__
def poisoned(self):
    batch = hand_out(self)
    return batch | {"loss_weight": batch["loss_weight"] * np.nan} if 5 <= self.position <= 7 else batch
Batches.__next__ = poisoned
"""


@pytest.mark.slow
def test_several_processes_go_back_together(
    small: Config, tmp_path: Path, never_shown: Skip, process_environment: dict[str, str]
) -> None:
    never_shown(5, 7)
    assert loop.train(small, tmp_path / "never") == 0
    (tmp_path / "poisoned.py").write_text(POISONED)
    config_io.dump_json(small, tmp_path / "small.json")
    path = f"{process_environment['PYTHONPATH']}{os.pathsep}{tmp_path}"
    words = ["--processes", "2", "--", "train", "--import", "poisoned", tmp_path / "small.json", "--out"]
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "launch.box", *map(str, words), str(run)],
        env=process_environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [back["batches"] for back in happened(run, "rolled back")] == [[5, 7]]
    assert [step for step, _ in losses(run)] == list(range(1, 13))
    # float32, summed in another order between processes.
    np.testing.assert_allclose([x for _, x in losses(run)], [x for _, x in losses(tmp_path / "never")], rtol=1e-6)


def test_events_tell_saves_and_every_record_goodput(small: Config, tmp_path: Path) -> None:
    assert loop.train(small, tmp_path / "run") == 0
    saves = happened(tmp_path / "run", "saved")
    assert [save["step"] for save in saves] == [4, 8, 12]
    assert all(save["bytes"] > 0 and save["save_s"] >= save["save_stall_s"] >= 0 for save in saves)
    for record in records(tmp_path / "run" / "metrics.jsonl"):
        assert 0 <= record["goodput"] <= 1
        assert record["data_wait_s"] >= 0
    kept = json.loads((tmp_path / "run" / "goodput.json").read_text())
    assert kept["furthest"] == 12
    assert all(seconds >= 0 for seconds in kept["seconds"].values())
    assert kept["seconds"]["lost"] == 0
