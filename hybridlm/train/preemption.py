"""Stopping on request: Ctrl-C and SIGTERM end the run after a step, saved; the exit code asks for a restart."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from hybridlm.config_check import ConfigError
from hybridlm.exit_codes import EXIT_INTERRUPTED


class StopRequest:
    """Listens for a request to stop while it is entered.

    In one process, SIGINT and SIGTERM set a flag; a second one interrupts at once. With several processes JAX's own
    SIGTERM notifier makes all of them agree on one step: a Python handler would switch it off, and is an error.
    """

    def __init__(self) -> None:
        self._flag = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        else:
            check_sigterm()
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
            check_sigterm()
            return multihost_utils.reached_preemption_sync_point(step)
        return self._flag


def check_sigterm() -> None:
    """Raise ConfigError where Python handles SIGTERM: JAX's own handler, which is not Python's, then never hears it."""
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        raise ConfigError(
            "SIGTERM",
            f": {getattr(handler, '__module__', '?')}.{getattr(handler, '__qualname__', handler)} handles it, and with "
            "several processes JAX has to, so that all of them stop at one step; leave that handler out",
        )
