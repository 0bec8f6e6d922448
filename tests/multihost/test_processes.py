"""Several processes learn what one process with as many devices learns, and stop and go on together."""

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.sharding import make_mesh
from hybridlm.train import loop

STEPS = 8
TOLERANCE = 1e-6
"""Relative, of losses in float32: between processes sums are taken in another order."""
MESHES = {
    "fsdp": ("sharding.mesh.data=1", "sharding.mesh.fsdp=4"),
    "tensor": ("sharding.mesh.data=1", "sharding.mesh.fsdp=2", "sharding.mesh.tensor=2"),
    "expert": ("sharding.mesh.data=2", "sharding.mesh.expert=2"),
    "context": ("sharding.mesh.data=2", "sharding.mesh.context=2"),
}
OneProcess = Callable[[str], tuple[Path, Path]]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """Of every training step and every evaluation."""
    trained, evaluated = records(run / "metrics.jsonl"), records(run / "eval.jsonl")
    assert [record["step"] for record in trained] == list(range(1, STEPS + 1))
    assert [record["step"] for record in evaluated] == [STEPS // 2, STEPS]
    return [record["loss"] for record in trained + evaluated]


@pytest.fixture(scope="session")
def one_process(
    tiny_config: Config, moe_config: Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    """`one_process(mesh)`: the file of its config, and the run of this process with four of its devices."""
    runs: dict[str, tuple[Path, Path]] = {}

    def run(mesh: str) -> tuple[Path, Path]:
        if mesh not in runs:
            directory = tmp_path_factory.mktemp(f"{mesh}-one-process")
            # Of the experts' model its pattern once: compiling is all that these runs cost.
            short = replace(moe_config, model=replace(moe_config.model, prologue=(), num_layers=2))
            base = short if mesh == "expert" else tiny_config
            base = replace(base, train=replace(base.train, steps=STEPS), eval=replace(base.eval, every=STEPS // 2))
            config_io.dump_json(config_io.override(base, MESHES[mesh]), directory / "config.json")
            config = config_io.load_json(directory / "config.json")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:4]))
                assert loop.train(config, directory / "run") == 0
            runs[mesh] = directory / "config.json", directory / "run"
        return runs[mesh]

    return run


@pytest.mark.parametrize(
    ("mesh", "processes"),
    [
        pytest.param("context", 2),
        pytest.param("fsdp", 4, marks=pytest.mark.slow),
        pytest.param("tensor", 4, marks=pytest.mark.slow),
        pytest.param("expert", 4, marks=pytest.mark.slow),
        pytest.param("context", 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_learn_what_one_learns(
    mesh: str, processes: int, one_process: OneProcess, start: Any, tmp_path: Path
) -> None:
    config, alone = one_process(mesh)
    first, *others = start(processes, 4 // processes, config, "--out", tmp_path / "run").ended()
    assert [first.code, *(other.code for other in others)] == [0] * processes, first.err + others[0].err
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)
    assert f"{processes} process(es)" in first.out
    assert f"done: {STEPS} steps" in first.out
    # The others leave writing and talking to the first; Gloo's own lines, cut into each other, are none of ours.
    beginnings = ("devices", "parameters", "data", "directory", "compiled", "step", "done")
    assert all(any(line.startswith(word) for line in first.out.splitlines()) for word in beginnings)
    said = [line for other in others for line in other.out.splitlines() if line.startswith(beginnings)]
    assert said == []


@pytest.mark.slow
def test_a_stopped_process_stops_all_and_they_go_on(one_process: OneProcess, start: Any, tmp_path: Path) -> None:
    config, alone = one_process("fsdp")
    words = (config, "--out", tmp_path / "run")
    running = start(2, 2, *words)
    # Before the first step, while it is compiled: the steps themselves take only milliseconds.
    running.wait_for("directory")
    running.processes[1].send_signal(signal.SIGTERM)
    first, second = running.ended()
    assert (first.code, second.code) == (75, 75), first.err + second.err
    stopped = [line for line in first.out.splitlines() if line.startswith("stopped at step ")]
    assert len(stopped) == 1
    step = int(stopped[0].split()[3])
    assert step < STEPS
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]

    first, second = start(2, 2, *words).ended()
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert f"resumed from step {step}" in first.out
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=TOLERANCE)
