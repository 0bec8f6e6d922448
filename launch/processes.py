"""Processes of one program that end together, and their output."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from hybridlm.exit_codes import EXIT_INTERRUPTED, EXIT_STOPPED
from hybridlm.supervisor import StopRequests

LEAVE_SECONDS = 10.0
"""For which a process may outlive one that failed: long enough to say that it has lost it."""


def run_together(
    command: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    requests: StopRequests,
    *,
    leave_seconds: float = LEAVE_SECONDS,
) -> int:
    """Run one process for each environment until all have ended; the exit code of the first that failed, or 0.

    One that fails ends the others. A request to stop reaches all as SIGTERM, a second one kills them. A process that a
    signal killed counts as 128 plus its number.
    """
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    processes: list[subprocess.Popen[str]] = []
    watchers: list[threading.Thread] = []
    code, passed_on, deadline = 0, requests.count, None
    try:
        for i, environment in enumerate(environments):
            # A session of its own: Ctrl-C in the terminal is ours to pass on, once.
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            processes.append(process)
            watchers.append(threading.Thread(target=_watch, args=(i, process, ended), daemon=True))
            watchers[-1].start()
        left = len(processes)
        while left:
            if requests.count > passed_on:
                number = signal.SIGTERM if passed_on == 0 else signal.SIGKILL
                passed_on = requests.count
                _send(processes, number)
            if deadline is not None and time.monotonic() > deadline:
                _send(processes, signal.SIGKILL)
            try:
                _, returned = ended.get(timeout=0.1)
            except queue.Empty:
                continue
            left -= 1
            if returned and not code:
                code = returned if returned > 0 else 128 - returned
                # Those that stopped on request save and leave by themselves.
                if code != EXIT_STOPPED:
                    deadline = time.monotonic() + leave_seconds
    finally:
        _send(processes, signal.SIGKILL)
        for watcher in watchers:
            watcher.join()
    return EXIT_INTERRUPTED if requests.count > 1 else code


def _send(processes: Sequence[subprocess.Popen[str]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, number)


def _watch(index: int, process: subprocess.Popen[str], ended: queue.Queue[tuple[int, int]]) -> None:
    pairs = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    copies = [threading.Thread(target=_copy, args=(index, *pair), daemon=True) for pair in pairs]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    ended.put((index, process.wait()))


def _copy(index: int, source: TextIO, sink: TextIO) -> None:
    for line in source:
        # One call a line, so that lines of two processes do not mix.
        sink.write(f"[{index}] {line.rstrip()}\n")
        sink.flush()
