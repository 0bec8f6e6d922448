"""Starting a run again: `hybridlm supervise`, and the policy that launchers share with it. Imports no JAX.

A supervisor holds no device, so that a process that was killed, or hangs and was ended, cannot take it along.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from hybridlm.exit_codes import EXIT_DONE, EXIT_INTERRUPTED, EXIT_WRONG_INPUT

FINAL = (EXIT_DONE, EXIT_WRONG_INPUT, EXIT_INTERRUPTED)
"""Exit codes after which starting again is of no use, or not what was asked for."""
POLL_SECONDS = 0.1


class StopRequests:
    """Counts SIGINT and SIGTERM while it is entered."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def supervise(command: Sequence[str], directory: Path, *, restarts: int, pause_seconds: float) -> int:
    """Run `command`, which trains in `directory`, until it needs no restart. Returns its last exit code."""
    with StopRequests() as requests:
        return run_again(
            lambda: run_to_end(command, requests),
            lambda: latest_checkpoint(directory),
            requests,
            restarts=restarts,
            pause_seconds=pause_seconds,
        )


def run_to_end(command: Sequence[str], requests: StopRequests) -> int:
    """The exit code of `command`; 128 plus the number of a signal that killed it.

    A request to stop is passed on as SIGTERM, a second one kills the process.
    """
    # A session of its own: Ctrl-C in the terminal is ours to pass on, once.
    process = subprocess.Popen(command, start_new_session=True)
    passed_on = requests.count
    try:
        while True:
            if requests.count > passed_on:
                number = signal.SIGTERM if passed_on == 0 else signal.SIGKILL
                passed_on = requests.count
                os.killpg(process.pid, number)
            try:
                code = process.wait(timeout=POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            if requests.count > 1:
                return EXIT_INTERRUPTED
            return code if code >= 0 else 128 - code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_again(
    attempt: Callable[[], int],
    progress: Callable[[], int | None],
    requests: StopRequests,
    *,
    restarts: int,
    pause_seconds: float = 1.0,
) -> int:
    """`attempt()` until it is done, is told to stop, or ends `restarts` + 1 times in a row without progress.

    `progress()` is the newest step that was saved: only one that is newer than all before counts. Wrong input (2) is
    never tried again.
    """
    fruitless = 0
    newest = progress()
    while True:
        code = attempt()
        if code in FINAL or requests.count or not restarts:
            return code
        before, newest = newest, _newer(newest, progress())
        fruitless = 0 if newest != before else fruitless + 1
        if fruitless > restarts:
            _say(f"exit code {code}, {fruitless} times in a row without a new checkpoint: giving up")
            return code
        where = "no checkpoint yet" if newest is None else f"newest checkpoint: step {newest}"
        after = f" in {pause_seconds:g} s" if pause_seconds else ""
        _say(f"exit code {code}: starting again{after} ({where})")
        _pause(pause_seconds, requests)
        if requests.count:
            return code


def latest_checkpoint(directory: Path) -> int | None:
    """The newest step that was saved; what is being written has another name."""
    steps = [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdecimal()]
    return max(steps, default=None)


def _newer(a: int | None, b: int | None) -> int | None:
    return max((step for step in (a, b) if step is not None), default=None)


def _pause(seconds: float, requests: StopRequests) -> None:
    """Sleep, unless there is a request to stop."""
    deadline = time.monotonic() + seconds
    while not requests.count and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(POLL_SECONDS, left))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
