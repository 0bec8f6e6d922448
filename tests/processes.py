"""Runs of several processes on this machine, none of which outlives its test."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SECONDS = 240
"""For all processes of a run together, on a busy machine."""
POLL_SECONDS = 0.05


class Ended(NamedTuple):
    """What a process left behind."""

    code: int
    out: str
    err: str


class Running:
    """The processes of one run."""

    def __init__(self, processes: list[subprocess.Popen[str]], logs: list[tuple[Path, Path]], seconds: float):
        self.processes, self.logs = processes, logs
        self._deadline = time.monotonic() + seconds

    def wait_for(self, text: str, *, of: int = 0) -> None:
        """Wait until a process has printed `text`."""
        out, err = self.logs[of]
        self.wait_until(lambda: text in out.read_text() + err.read_text(), of=of)

    def wait_until(self, condition: Callable[[], bool], *, of: int = 0, poll_seconds: float = POLL_SECONDS) -> None:
        """Wait until something is true while a process runs."""
        while not condition():
            ended = self.processes[of].poll() is not None
            if ended and condition():
                return
            assert not ended, self.said(of)
            assert time.monotonic() < self._deadline, f"waited too long: {self.said(of)}"
            time.sleep(poll_seconds)

    def send(self, number: int, *to: int) -> None:
        """A signal to these processes, or to all."""
        for i in to or range(len(self.processes)):
            self.processes[i].send_signal(number)

    def kill(self, *which: int) -> None:
        self.send(signal.SIGKILL, *which)

    def said(self, of: int = 0) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.logs[of])

    def ended(self) -> list[Ended]:
        """Wait for all of them."""
        for process in self.processes:
            process.wait(timeout=max(0.0, self._deadline - time.monotonic()))
        logs = [(out.read_text(errors="replace"), err.read_text(errors="replace")) for out, err in self.logs]
        return [Ended(process.returncode, *log) for process, log in zip(self.processes, logs, strict=True)]


def environment(cache: Path) -> dict[str, str]:
    """For subprocesses: this checkout's packages, eight fake devices of the CPU, a compilation cache."""
    root = Path(__file__).parent.parent
    return os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


TRAIN = ("-m", "hybridlm.cli", "train")
Start = Callable[..., Running]
"""`start(num_processes, devices_per_process, *words)`."""


@contextmanager
def starting(environment: dict[str, str], directory: Path, seconds: float = SECONDS) -> Iterator[Start]:
    """`start(num_processes, devices_per_process, *words)`: `hybridlm train WORDS` in so many processes, or another
    `program` of Python.

    They work in `directory`, or in that of the call, where their logs are, and may take so many `seconds` together;
    what still runs in the end is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def run(
        num_processes: int,
        devices_per_process: int,
        *words: object,
        directory: Path = directory,
        program: Sequence[str] = TRAIN,
    ) -> Running:
        command = [sys.executable, *program, *map(str, words)]
        group = {"JAX_NUM_CPU_DEVICES": str(devices_per_process)}
        if num_processes > 1:
            group |= {
                "HYBRIDLM_COORDINATOR": f"127.0.0.1:{free_port()}",
                "HYBRIDLM_NUM_PROCESSES": str(num_processes),
            }
        names = [str(len(started) + i) for i in range(num_processes)]
        logs = [(directory / f"{name}.out", directory / f"{name}.err") for name in names]
        processes = []
        for i, (out, err) in enumerate(logs):
            its_own = {"HYBRIDLM_PROCESS_ID": str(i)} if num_processes > 1 else {}
            with out.open("w") as stdout, err.open("w") as stderr:
                started.append(
                    subprocess.Popen(
                        command,
                        env=environment | group | its_own,
                        cwd=directory,
                        stdout=stdout,
                        stderr=stderr,
                        text=True,
                    )
                )
            processes.append(started[-1])
        return Running(processes, logs, seconds)

    try:
        yield run
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
