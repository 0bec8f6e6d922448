"""How fast a run goes: seconds per step, tokens per second, model FLOP utilisation."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from hybridlm.config import Config
from hybridlm.flops import peak_flops
from hybridlm.train.teacher import step_flops


class StepClock:
    """Time per step between two records; evaluations and saves do not count."""

    def __init__(self, config: Config, first_step: int):
        devices = jax.devices()
        self._tokens_per_step = config.train.batch_size * config.data.seq_len
        self._ideal_seconds = step_flops(config) * self._tokens_per_step / (peak_flops(devices[0]) * len(devices))
        self._in_flight: collections.deque[Any] = collections.deque()
        self._step, self._mark, self._idle = first_step, time.monotonic(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in here is not the steps'."""
        started = time.monotonic()
        yield
        self._idle += time.monotonic() - started

    def limit_run_ahead(self, metrics: Any) -> None:
        """Wait, without a transfer, until at most two steps are queued on the device."""
        self._in_flight.append(metrics)
        if len(self._in_flight) > 2:
            jax.block_until_ready(self._in_flight.popleft())

    def lap(self, step: int) -> dict[str, float]:
        """Averages over the steps since the last lap; call it when `step` has just finished on the device."""
        now = time.monotonic()
        seconds = (now - self._mark - self._idle) / (step - self._step)
        self._step, self._mark, self._idle = step, now, 0.0
        return {
            "tokens_per_second": self._tokens_per_step / seconds,
            "mfu": self._ideal_seconds / seconds,
            "step_time_s": seconds,
        }
