"""Going back to the last checkpoint, and over batches that spoil the steps behind it."""

from hybridlm.data.pipeline import Batches
from hybridlm.train.metrics import Events
from hybridlm.train.rejection import TooManyRejected


class Rollbacks:
    """Which batches are jumped over, and how often the run went back to one checkpoint.

    A later checkpoint is proof that the run got past the place: checkpoints are written after accepted steps only.
    """

    def __init__(self, limit: int, events: Events):
        self._limit, self._events = limit, events
        self._jumped: list[tuple[int, int]] = []
        self._back_to, self._times = -1, 0

    def note(self, rejected: TooManyRejected, back_to: int) -> str:
        """Have the batches of these steps jumped over; what a person is told.

        Raises FloatingPointError where the run went back to step `back_to` as often as it may.
        """
        first, last = rejected.steps[0], rejected.steps[-1]
        if back_to != self._back_to:
            self._back_to, self._times = back_to, 0
        if self._times == self._limit:
            self._events.add("stopped", last.step, reason=last.reason)
            again = f", also after going back to step {back_to} {self._times} times" if self._times else ""
            raise FloatingPointError(
                f"step {last.step}: loss or gradient was {last.kind} {len(rejected.steps)} times in a row (none of "
                f"them changed the parameters){again}; lower optimizer.peak_lr or clip_norm and go on from the latest "
                "checkpoint"
            )
        self._times += 1
        self._jumped.append((first.batch, last.batch))
        self._events.add(
            "rolled back", back_to, rejected=[first.step, last.step], batches=self._jumped[-1], reason=last.reason
        )
        return (
            f"steps {first.step} to {last.step} were rejected ({last.reason}): back to step {back_to}, and over "
            f"batches {first.batch} to {last.batch}"
        )

    def jump(self, batches: Batches) -> None:
        """Leave out of `batches` what is jumped over and still to come."""
        for first, last in self._jumped:
            if last > batches.position:
                batches.skip(max(first, batches.position + 1), last)
