"""Processes that end together, and the policy by which they start again."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridlm.supervisor import StopRequests, latest_checkpoint, run_again
from launch.processes import run_together

FAST = {"restarts": 2, "pause_seconds": 0.0}


def together(*scripts: str, **settings: Any) -> int:
    """Python scripts as the processes of one run."""
    command = [sys.executable, "-c", "import os; exec(os.environ['SCRIPT'])"]
    environments = [dict(os.environ) | {"SCRIPT": script, "INDEX": str(i)} for i, script in enumerate(scripts)]
    with StopRequests() as requests:
        return run_together(command, environments, requests, **settings)


@pytest.fixture
def interrupt() -> Iterator[Callable[[int], None]]:
    """`interrupt(times)`: SIGINT to this process, so often, from half a second on."""
    timers: list[threading.Timer] = []

    def later(times: int) -> None:
        for i in range(times):
            timers.append(threading.Timer(0.5 + 0.5 * i, os.kill, (os.getpid(), signal.SIGINT)))
            timers[-1].start()

    yield later
    for timer in timers:
        timer.cancel()


def test_lines_begin_with_the_number_of_their_process(capsys: pytest.CaptureFixture[str]) -> None:
    script = "import os, sys; print('out', os.environ['INDEX']); print('err', file=sys.stderr)"
    assert together(script, script) == 0
    out, err = capsys.readouterr()
    assert sorted(out.splitlines()) == ["[0] out 0", "[1] out 1"]
    assert sorted(err.splitlines()) == ["[0] err", "[1] err"]


def test_one_that_fails_ends_the_others_and_its_code_counts() -> None:
    started = time.monotonic()
    assert together("import time; time.sleep(60)", "raise SystemExit(7)", leave_seconds=0.2) == 7
    assert time.monotonic() - started < 30


def test_a_killed_process_counts_as_its_signal() -> None:
    assert together("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == 128 + signal.SIGKILL


WAITS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(60)"
WILL_NOT = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def test_a_request_to_stop_reaches_all_once(interrupt: Callable[[int], None]) -> None:
    interrupt(1)
    assert together(WAITS, WAITS) == 75


def test_a_second_request_kills(interrupt: Callable[[int], None]) -> None:
    interrupt(2)
    assert together(WILL_NOT, WILL_NOT) == 130


def codes(*ended: int, steps: list[int] | None = None) -> tuple[Callable[[], int], Callable[[], int], list[int]]:
    """An attempt that ends so, one after another; the newest checkpoint after each; and what has ended."""
    seen: list[int] = []

    def attempt() -> int:
        seen.append(ended[len(seen)])
        return seen[-1]

    return attempt, lambda: steps[len(seen)] if steps else 0, seen


@pytest.mark.parametrize(
    ("ended", "steps", "expected"),
    [
        ((0,), [0, 8], [0]),
        ((75, 75, 75, 75, 0), [0, 1, 2, 3, 4, 5], [75, 75, 75, 75, 0]),
        ((2, 0), [0, 0, 0], [2]),
        ((1, 1, 1, 0), [0, 0, 0, 0, 0], [1, 1, 1]),
        ((1, 1, 1, 1, 0), [0, 0, 4, 4, 4, 8], [1, 1, 1, 1, 0]),
        ((134, 75, 0), [0, 0, 5, 9], [134, 75, 0]),
    ],
)
def test_a_run_starts_again_while_it_gets_on(ended: tuple[int, ...], steps: list[int], expected: list[int]) -> None:
    attempt, progress, seen = codes(*ended, steps=steps)
    with StopRequests() as requests:
        assert run_again(attempt, progress, requests, **FAST) == expected[-1]
    assert seen == expected


def test_nothing_starts_again_unless_asked() -> None:
    attempt, progress, seen = codes(75, 0)
    with StopRequests() as requests:
        assert run_again(attempt, progress, requests, restarts=0) == 75
    assert seen == [75]


def test_a_stopped_box_does_not_start_again() -> None:
    attempt, progress, seen = codes(75, 0, steps=[0, 1, 2])
    with StopRequests() as requests:
        requests.count = 1
        assert run_again(attempt, progress, requests, **FAST) == 75
    assert seen == [75]


def test_unfinished_checkpoints_are_no_progress(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for name in ("4", "12", "16.orbax-checkpoint-tmp", "incomplete.20"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert latest_checkpoint(tmp_path) == 12
