"""Asking a run to stop: saved, exit code 75, and nothing lost."""

import json
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hybridlm.config_check import ConfigError
from hybridlm.train.preemption import StopRequest


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in map(json.loads, (run / "metrics.jsonl").open())}


NORMALLY = "from hybridlm.cli import main; main()"
NEVER_REACHES_THE_END_OF_A_STEP = """
from hybridlm.cli import main
from hybridlm.train.preemption import StopRequest
StopRequest.at = lambda self, step: False
main()
"""


def start(
    config: Path, out: Path, environment: dict[str, str], *more: str, run: str = NORMALLY
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", run, "train", str(config), "--out", str(out), *more]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # A run that hangs fails the test instead of hanging it.
    killer = threading.Timer(300, process.kill)
    killer.daemon = True
    killer.start()
    return process


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    """Read lines of output up to one that begins so."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(f"never saw {beginning!r} in: {''.join(seen)}")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(
    trained_run: Path, tmp_path: Path, process_environment: dict[str, str], number: signal.Signals
) -> None:
    config, run = trained_run / "config.json", tmp_path / "run"
    # Before the first step, while it is compiled: the steps themselves take only milliseconds.
    process = start(config, run, process_environment)
    wait_for(process, "directory")
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == 75, err
    assert f"{number.name}: saving after this step; once more quits without saving" in err
    stopped = re.search(r"stopped at step (\d+) of 12, saved; the same command goes on from there", out)
    assert stopped is not None, out
    again = start(config, run, process_environment)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert f"resumed from step {stopped[1]}\n" in out
    assert losses(run) == losses(trained_run)


def test_a_second_signal_quits_at_once(trained_run: Path, tmp_path: Path, process_environment: dict[str, str]) -> None:
    process = start(
        trained_run / "config.json",
        tmp_path / "run",
        process_environment,
        "--train.steps=1000000",
        run=NEVER_REACHES_THE_END_OF_A_STEP,
    )
    wait_for(process, "directory")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while not process.stderr.readline().startswith("SIGINT: saving"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err == "hybridlm: interrupted, not saved\n"


def test_a_python_handler_that_would_deafen_several_processes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with StopRequest():
        previous = signal.signal(signal.SIGTERM, somebody_elses)
        try:
            with pytest.raises(ConfigError, match=r"SIGTERM: .*test_preemption.somebody_elses handles it, .* leave"):
                StopRequest().at(3)
            with pytest.raises(ConfigError, match="leave that handler out"), StopRequest():
                pass
        finally:
            signal.signal(signal.SIGTERM, previous)


def somebody_elses(number: int, frame: object) -> None:
    pass
