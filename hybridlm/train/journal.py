"""What is written down of the steps of a run, one step behind the device."""

from typing import Any

import jax

from hybridlm.config import Config
from hybridlm.data.pipeline import Batches
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.clock import StepClock
from hybridlm.train.goodput import Goodput
from hybridlm.train.metrics import Events, NoLog, RunLog
from hybridlm.train.rejection import Rejections
from hybridlm.train.step import Metrics


class Journal:
    """Follows the steps from one checkpoint on: logged ones into metrics, rejected ones and saves into events."""

    def __init__(
        self,
        config: Config,
        first_step: int,
        log: RunLog | NoLog,
        events: Events,
        goodput: Goodput,
        checkpoints: Checkpoints,
    ):
        self._log, self._events, self._goodput, self._checkpoints = log, events, goodput, checkpoints
        self._every, self._last = config.train.log_every, config.train.steps
        self._tokens_per_step = config.train.batch_size * config.data.seq_len
        self._rejections = Rejections(config.train.max_nonfinite_steps)
        self._data_wait = 0.0
        self._pending: tuple[int, Metrics, dict[str, float]] | None = None
        self.clock = StepClock(config, first_step)

    def dispatched(self, step: int, metrics: Metrics, batches: Batches, waited: float) -> None:
        """A step that may still be running, of the batch just handed out, and how long the device waited for that."""
        self._rejections.dispatched(step, batches.position, metrics)
        self._data_wait += waited
        for source, epoch in batches.repeated().items():
            self._events.add("repeats", step, source=source, epoch=epoch)
            self._log.say(f"step {step}: {source} begins for the {epoch}. time")
        if step % self._every == 0 or step == self._last:
            self._pending = step, metrics, batches.progress()

    def write(self) -> None:
        """Write what there is of the last logged step; waits for it.

        Raises TooManyRejected where the steps up to it have to be gone back over.
        """
        if self._pending is None:
            return
        (step, metrics, progress), self._pending = self._pending, None
        values: dict[str, Any] = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
        values |= self.clock.lap(step) | progress | self.saved()
        values |= {"data_wait_s": self._data_wait, "goodput": self._goodput.fraction()}
        self._data_wait = 0.0
        self._log.train({"step": step, "tokens": step * self._tokens_per_step} | values)
        self._goodput.write()
        self._read(step)

    def settle(self, step: int) -> bool:
        """Write everything up to `step` and wait for it; whether it was accepted. Raises as `write`."""
        self.write()
        self._read(step)
        return not self._rejections.in_progress

    def saved(self) -> dict[str, float]:
        """Note the saves that were committed since the last call; seconds of the latest."""
        times = {}
        for saved in self._checkpoints.finished():
            times = {"save_s": saved.seconds, "save_stall_s": saved.stall_seconds}
            self._events.add("saved", saved.step, bytes=saved.num_bytes, **times)
        return times

    def _read(self, until: int) -> None:
        for rejected in self._rejections.read(until):
            self._events.add("skipped", rejected.step, batch=rejected.batch, reason=rejected.reason)
