"""What is started again, and what is not; with commands that pretend."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlm.supervisor import StopRequests, run_again, supervise

PRETENDS = """
import json, os, pathlib, signal, sys
run = pathlib.Path(sys.argv[1])
plan = json.loads(sys.argv[2])
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
count = len(list(run.glob("start.*")))
(run / f"start.{count}").touch()
code, step = plan[min(count, len(plan) - 1)]
if step:
    (run / "checkpoints" / str(step)).mkdir(exist_ok=True)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""


def supervised(run: Path, *plan: tuple[int, int], restarts: int = 2) -> tuple[int, int]:
    """The exit code and the number of starts, of a command that ends with `(exit code, step it has saved)` in turn."""
    command = [sys.executable, "-c", PRETENDS, str(run), json.dumps(plan)]
    code = supervise(command, run, restarts=restarts, pause_seconds=0.0)
    return code, len(list(run.glob("start.*")))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ([(0, 4)], (0, 1)),
        ([(75, 1), (75, 2), (75, 3), (75, 4), (0, 5)], (0, 5)),
        ([(76, 3), (1, 3), (1, 6), (0, 9)], (0, 4)),
        ([(2, 0)], (2, 1)),
        ([(130, 4)], (130, 1)),
        ([(-signal.SIGKILL, 4), (-signal.SIGABRT, 8), (0, 12)], (0, 3)),
        ([(1, 4)], (1, 4)),
        ([(75, 0)], (75, 3)),
    ],
)
def test_a_run_is_started_again_while_it_gets_on(
    tmp_path: Path, plan: list[tuple[int, int]], expected: tuple[int, int]
) -> None:
    assert supervised(tmp_path, *plan) == expected


def test_it_says_what_it_does_in_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    supervised(tmp_path, (75, 8), (1, 8), restarts=1)
    assert capsys.readouterr().err.splitlines() == [
        "exit code 75: starting again (newest checkpoint: step 8)",
        "exit code 1: starting again (newest checkpoint: step 8)",
        "exit code 1, 2 times in a row without a new checkpoint: giving up",
    ]


def test_a_checkpoint_that_was_set_aside_is_no_progress() -> None:
    newest = iter([12, 8, 8, 8])
    with StopRequests() as requests:
        assert run_again(lambda: 1, lambda: next(newest), requests, restarts=2, pause_seconds=0.0) == 1
    assert list(newest) == []


def when_there(path: Path, then: Callable[[], None]) -> threading.Thread:
    """Calls `then` as soon as `path` exists, or after a minute."""
    stop = threading.Event()

    def watch() -> None:
        for _ in range(600):
            if path.exists():
                break
            stop.wait(0.1)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_run_and_ends_the_supervisor(tmp_path: Path, number: signal.Signals) -> None:
    when_there(tmp_path / "started", lambda: os.kill(os.getpid(), number))
    command = [sys.executable, "-c", WAITS, str(tmp_path / "started")]
    assert supervise(command, tmp_path, restarts=5, pause_seconds=0.0) == 75


def test_a_signal_between_two_starts_ends_the_supervisor(tmp_path: Path) -> None:
    when_there(tmp_path / "start.0", lambda: threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start())
    command = [sys.executable, "-c", PRETENDS, str(tmp_path), json.dumps([(75, 4)])]
    assert supervise(command, tmp_path, restarts=5, pause_seconds=300.0) == 75
    assert len(list(tmp_path.glob("start.*"))) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["supervise"], "--: is missing, and the command behind it"),
        (["supervise", "--", "eval", "runs/x"], "only `train` does"),
        (["supervise", "--", "train", "griffin_tiny", "--train.stps=3"], "train.stps: no such field"),
        (["supervise", "--restarts=-1", "--", "train", "griffin_tiny"], "--restarts=-1: must be at least 0"),
        (["supervise", "--train.steps=3", "--", "train", "griffin_tiny"], "belongs to the command behind --"),
        (["show", "griffin_tiny", "--", "train"], "--: only `hybridlm supervise` takes a command behind it"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_started(
    invoke: Callable[..., Any], words: list[str], said: str
) -> None:
    invoke(*words).assert_refused(said)
