"""Goodput: the share of a run's time that went into steps it kept, and where the rest went.

Every second since the run's first start is of one kind. Totals are kept in `goodput.json`, over restarts too.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

KINDS = {
    "steps": "steps",
    "start": "start-up",
    "compile": "compiling",
    "restore": "making or restoring the state",
    "data": "waiting for data",
    "evaluation": "evaluation",
    "save": "stalled by saves",
    "compare": "comparing replicas",
    "lost": "steps run again",
    "down": "between processes",
}
"""Names of the kinds, and what a person calls them."""
WRITE_EVERY_SECONDS = 1.0


class Goodput:
    """Books the time of this process, after that of the ones before it.

    Durations are monotonic; the wall clock only tells how long no process was there, and never less than nothing.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        """`path` is None where the totals are not kept: in all processes of a run but the first."""
        self._path, self._monotonic, self._wall = path, monotonic, wall
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.furthest = 0
        """The last step that was ever taken: what is run again up to there is lost."""
        self._kind, self._mark = "start", monotonic()
        self._written = self._mark
        if path is not None and path.exists():
            self._go_on(path.read_text())

    def _go_on(self, text: str) -> None:
        try:
            before = json.loads(text)
        except ValueError:
            return  # empty after a power failure: the totals begin anew, the run does not depend on them
        self.seconds |= {name: value for name, value in before["seconds"].items() if name in KINDS}
        self.furthest = before["furthest"]
        self.seconds["down"] += max(0.0, self._wall() - before["as_of"])

    def __enter__(self) -> "Goodput":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._kind == "start":
            return  # nothing was done: the run is finished, or was refused
        # What went wrong before is what a person has to know, not that this goes wrong for the same reason.
        with contextlib.nullcontext() if exception[0] is None else contextlib.suppress(OSError):
            self.write(at_once=True)

    def enter(self, kind: str) -> None:
        """Time up to now was of the kind entered before; from now on it is of this one."""
        assert kind in KINDS
        now = self._monotonic()
        self.seconds[self._kind] += now - self._mark
        self._kind, self._mark = kind, now

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Time in here is of this kind, whatever it is around it."""
        outer = self._kind
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(outer)

    def step(self, step: int) -> None:
        """This step begins now."""
        self.enter("lost" if step <= self.furthest else "steps")
        self.furthest = max(self.furthest, step)

    def move(self, seconds: float, kind: str) -> None:
        """So much of the time that was booked just now turns out to be of this kind."""
        self.enter(self._kind)
        self.seconds[self._kind] -= seconds
        self.seconds[kind] += seconds

    def fraction(self) -> float:
        """Steps that were kept, over all time since the first start."""
        self.enter(self._kind)
        total = sum(self.seconds.values())
        return self.seconds["steps"] / total if total else 0.0

    def write(self, *, at_once: bool = False) -> None:
        """Keep the totals, now and then or at once. After a crash, what was not kept counts as between processes."""
        self.enter(self._kind)
        if self._path is None or not (at_once or self._mark - self._written >= WRITE_EVERY_SECONDS):
            return
        self._written = self._mark
        kept = {"seconds": self.seconds, "furthest": self.furthest, "as_of": self._wall()}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(kept) + "\n")
        os.replace(temporary, self._path)

    def text(self) -> str:
        """One line for people: the share of the steps, and the losses, largest first."""
        good, total = self.fraction(), sum(self.seconds.values())
        losses = sorted(((s, k) for k, s in self.seconds.items() if k != "steps"), reverse=True)
        named = [f"{KINDS[kind]} {seconds / total:.1%}" for seconds, kind in losses if seconds / total >= 0.0005]
        return f"goodput {good:.1%} of {total:,.0f} s" + (f"; {', '.join(named)}" if named else "")
