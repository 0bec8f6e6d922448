"""Stopping on request: Ctrl-C and SIGTERM end the run after a step, saved; the exit code asks for a restart."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = 75
"""Exit code of a run that saved and wants to be started again (EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Exit code after a second request, as of a process that SIGINT ended."""


class StopRequest:
    """Listens for a request to stop while it is entered.

    In one process, SIGINT and SIGTERM set a flag; a second one interrupts at once. With several processes JAX's own
    SIGTERM notifier makes all of them agree on one step: a Python handler would switch it off.
    """

    def __init__(self) -> None:
        self._flag = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._flag:
            # Not KeyboardInterrupt: raised in a callback of the compiler or of the garbage collector it would be lost.
            os.write(2, b"hybridlm: interrupted, not saved\n")
            os._exit(EXIT_INTERRUPTED)
        self._flag = True
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one, whose buffer is locked.
        os.write(2, f"\n{name}: saving after this step; once more quits without saving\n".encode())

    def at(self, step: int) -> bool:
        """Whether to stop after this step. Every process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag
