"""Which source each sample of a mixture comes from, by arithmetic on its number. Letters: k sources, p period.

Within a stage the sources take turns in a fixed pattern of p samples, in which source k has n_k = share_k * p places.
So for any sample its source, and how many samples of each source came before it, are known at once; where weights
change, the counts go on from what they were.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from jaxtyping import Int64

LONGEST_PERIOD = 2**16
"""A source's share of a stage is a multiple of one over its period, within 2^-17 of what the weights say."""


def quantise(weights: Mapping[str, float]) -> tuple[int, ...]:
    """Places of each source in a period of at most `LONGEST_PERIOD`; exact where so many can be.

    Raises:
        ValueError: a weight is positive, but too small a share for one place.
    """
    total = sum(map(_exactly, weights.values()))
    shares = [_exactly(weight) / total for weight in weights.values()]
    for name, share in zip(weights, shares, strict=True):
        if 0 < share < Fraction(1, LONGEST_PERIOD):
            raise ValueError(
                f"{name} has a share of {float(share):.3g}; the smallest is 1 in {LONGEST_PERIOD:,}, or 0 for none"
            )
    simple = [share.limit_denominator(LONGEST_PERIOD) for share in shares]
    period = math.lcm(*(share.denominator for share in simple))
    # 1/3 is not what a float holds, but what is meant.
    close = all(abs(a - b) < 1e-12 for a, b in zip(simple, shares, strict=True))
    if close and sum(simple) == 1 and period <= LONGEST_PERIOD:
        return tuple(int(share * period) for share in simple)
    places = [int(share * LONGEST_PERIOD) for share in shares]
    remainders = [share * LONGEST_PERIOD - whole for share, whole in zip(shares, places, strict=True)]
    largest = sorted(range(len(places)), key=lambda k: -remainders[k])
    for k in largest[: LONGEST_PERIOD - sum(places)]:
        places[k] += 1
    return tuple(places)


def _exactly(weight: float) -> Fraction:
    """The decimal number that was written, not the binary one next to it."""
    return Fraction(repr(weight))


def interleave(places: Sequence[int]) -> Int64[np.ndarray, " p"]:
    """Sources in their turns: of any first m of them, source k has less than one more or fewer than m n_k / p.

    The chairman assignment problem (Tijdeman, 1980), solved as unit jobs on one machine by earliest deadline: place j
    of source k, from 0, may be taken from turn floor(j p / n_k) on, and must be by turn ceil((j + 1) p / n_k) - 1.
    """
    period = sum(places)
    waiting = [(0, k, 0) for k, n in enumerate(places) if n]  # (first turn, source, j)
    heapq.heapify(waiting)
    ready: list[tuple[int, int, int]] = []  # (last turn, source, j)
    turns = np.empty(period, np.int64)
    for turn in range(period):
        while waiting and waiting[0][0] <= turn:
            _, k, j = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(j + 1) * period // places[k]) - 1, k, j))
        _, k, j = heapq.heappop(ready)
        turns[turn] = k
        if j + 1 < places[k]:
            heapq.heappush(waiting, ((j + 1) * period // places[k], k, j + 1))
    return turns


@dataclass(frozen=True)
class Stage:
    """Weights from one sample on."""

    first_sample: int
    places: tuple[int, ...]
    """Of each source in a period: what `quantise` makes of its weights."""

    @property
    def period(self) -> int:
        return sum(self.places)

    @cached_property
    def turns(self) -> Int64[np.ndarray, " p"]:
        """The source of each sample of a period."""
        return interleave(self.places)

    @cached_property
    def before(self) -> Int64[np.ndarray, " p"]:
        """How many samples of the same source come before each sample of a period."""
        before = np.empty_like(self.turns)
        for k, n in enumerate(self.places):
            before[self.turns == k] = np.arange(n)
        return before

    def counts(self, num_samples: int) -> Int64[np.ndarray, " k"]:
        """Samples of each source among the first `num_samples` of the stage."""
        periods, rest = divmod(num_samples, self.period)
        places = np.array(self.places, np.int64)
        return periods * places + np.bincount(self.turns[:rest], minlength=len(places))


class Proportions:
    """Stages one after the other, the first from sample 0 on and each of the others from a later one."""

    def __init__(self, stages: Sequence[Stage]):
        assert stages[0].first_sample == 0
        self.stages = tuple(stages)
        counts = [np.zeros(len(stages[0].places), np.int64)]
        for stage, following in zip(stages, stages[1:], strict=False):
            counts.append(counts[-1] + stage.counts(following.first_sample - stage.first_sample))
        self._counts = counts

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, number of samples of this source before)."""
        s = self._stage_of(sample)
        stage = self.stages[s]
        periods, turn = divmod(sample - stage.first_sample, stage.period)
        k = int(stage.turns[turn])
        return k, int(self._counts[s][k]) + periods * stage.places[k] + int(stage.before[turn])

    def counts(self, num_samples: int) -> Int64[np.ndarray, " k"]:
        """Samples of each source among the first `num_samples`."""
        s = self._stage_of(num_samples)
        return self._counts[s] + self.stages[s].counts(num_samples - self.stages[s].first_sample)

    def _stage_of(self, sample: int) -> int:
        return max(s for s, stage in enumerate(self.stages) if stage.first_sample <= sample)
