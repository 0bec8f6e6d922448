"""Ends a process that hangs, with the stacks of all its threads on stderr.

JAX's heartbeats tell the others of a process that died or was stopped, not of one whose main thread waits for ever.
"""

import contextlib
import faulthandler
import time
from collections.abc import Iterable, Iterator
from typing import Any

STDERR = 2
FIRST_WAITS_SECONDS = 10.0
"""Longer than the others does the first of several processes wait: with it they end at once, their stacks unwritten."""


class Watchdog:
    """Ends the process with exit code 1 when it was armed and nothing happened for `seconds`; None is never."""

    def __init__(self, seconds: int | float | None, *, longer: float = 0.0):
        self._seconds = None if seconds is None else seconds + longer
        self._armed_at: float | None = None
        # Arming starts a thread: often enough is once in a tenth of the time, and at most once a second.
        self._precision = 0.0 if seconds is None else min(1.0, seconds / 10)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.disarm()

    def alive(self) -> None:
        """Something happened: the time begins anew."""
        if self._seconds is None:
            return
        now = time.monotonic()
        if self._armed_at is None or now - self._armed_at >= self._precision:
            self._armed_at = now
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=STDERR)

    def disarm(self) -> None:
        """Until the next `alive` anything may take as long as it needs."""
        if self._armed_at is not None:
            self._armed_at = None
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """What is done in here may take as long as it needs, such as compiling and restoring."""
        self.disarm()
        yield

    def watched(self, batches: Iterable[Any], *, compiled: bool) -> Iterator[Any]:
        """The same batches, each a sign of life; the first one's step may have to be compiled."""
        for batch in batches:
            if compiled:
                self.alive()
            else:
                self.disarm()
            compiled = True
            yield batch
        self.disarm()
