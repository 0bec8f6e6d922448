"""Steps that were rejected: which, why, and when a run has to go back.

A step decides on the device whether it changes anything. The host reads that later, in bulk and without waiting.
"""

import math
from dataclasses import dataclass

import jax

from hybridlm.train.step import Metrics

COUNT = "nonfinite_in_a_row"
READ = (COUNT, "loss", "grad_norm")


@dataclass(frozen=True)
class Rejected:
    """A step that changed nothing."""

    step: int
    batch: int
    """Its number in the order of the data."""
    loss: float
    grad_norm: float

    @property
    def kind(self) -> str:
        return "a spike" if math.isfinite(self.loss) and math.isfinite(self.grad_norm) else "not finite"

    @property
    def reason(self) -> str:
        return f"{self.kind}: loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"


class TooManyRejected(Exception):
    """These steps were rejected one after another, so many that the run has to go back."""

    def __init__(self, steps: list[Rejected]):
        super().__init__(f"{len(steps)} steps in a row were rejected")
        self.steps = steps


class Rejections:
    """Follows the steps of a run from a checkpoint on."""

    def __init__(self, limit: int):
        self._limit = limit
        self._unread: list[tuple[int, int, Metrics]] = []
        self._in_a_row: list[Rejected] = []

    def dispatched(self, step: int, batch: int, metrics: Metrics) -> None:
        """Remember a step that may still be running."""
        self._unread.append((step, batch, {name: metrics[name] for name in READ}))

    @property
    def in_progress(self) -> bool:
        """Whether the last step that was read was rejected: the next may be too."""
        return bool(self._in_a_row)

    def read(self, until: int) -> list[Rejected]:
        """Those of the steps up to `until` that were rejected; waits for that step.

        Raises TooManyRejected where `limit` or more were rejected one after another.
        """
        read = [entry for entry in self._unread if entry[0] <= until]
        self._unread = self._unread[len(read) :]
        counts = jax.device_get([metrics[COUNT] for _, _, metrics in read])
        found: list[Rejected] = []
        too_many: list[Rejected] = []
        for (step, batch, metrics), count in zip(read, counts, strict=True):
            if not count:
                self._in_a_row = []
                continue
            values = jax.device_get(metrics)
            found.append(Rejected(step, batch, float(values["loss"]), float(values["grad_norm"])))
            self._in_a_row.append(found[-1])
            if len(self._in_a_row) >= self._limit:
                too_many = self._in_a_row
        if too_many:
            raise TooManyRejected(list(too_many))
        return found
