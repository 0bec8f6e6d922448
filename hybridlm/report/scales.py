"""Axes: which values they hold, where their ticks stand, and how these are written."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

UNITS = ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
"""Of labels: from which value on, the unit, its letter."""
STEPS = (1.0, 2.0, 5.0, 10.0)
LOG_FROM_RATIO = 50.0
"""Positive values that differ by more are drawn on a logarithmic axis."""

NARROWEST = 1e-3
"""Values that differ by less than this share of them are drawn as the same: their noise is not worth the page."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Pixels of values, of the same shape."""
        low, high, at = self.low, self.high, np.asarray(values, np.float64)
        if self.is_log:
            low, high, at = math.log(low), math.log(high), np.log(at)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, num: int) -> list[tuple[float, str]]:
        """About `num` round values within the axis, and their labels."""
        values = log_ticks(self.low, self.high, num) if self.is_log else linear_ticks(self.low, self.high, num)
        return list(zip(values, labels(values), strict=True))


def axis_of(values: np.ndarray, start: float, end: float, *, is_log: bool | None = None, from_zero: bool) -> Scale:
    """An axis that holds all finite `values`, with some room around them. `is_log` None is decided by their range."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if is_log is None:
        is_log = low > 0 and high / low > LOG_FROM_RATIO
    if is_log and low > 0:
        room = (high / low) ** 0.04 if high > low else 1.5
        return Scale(low=low / room, high=high * room, start=start, end=end, is_log=True)
    if from_zero:
        low = min(low, 0.0)
    if high - low < NARROWEST * max(abs(low), abs(high)) or high == low:
        spread = 0.1 * max(abs(low), abs(high)) or 1.0
        low, high = (low, high + spread) if low == 0 else (low - spread, high + spread)
    room = 0.04 * (high - low)
    return Scale(low=low if low == 0 and from_zero else low - room, high=high + room, start=start, end=end)


def linear_ticks(low: float, high: float, num: int) -> list[float]:
    rough = (high - low) / max(num, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((step * power for step in STEPS), key=lambda step: abs(math.log(step / rough)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float, num: int) -> list[float]:
    """Powers of ten, fewer or with 2 and 5 between them as there is room; linear ones where there is less than that."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / (num + 1)))
    powers = [10.0**n for n in range(first, last + 1) if n % every == 0]
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        found = [power * factor for power in powers for factor in factors if low <= power * factor <= high]
        if len(found) >= 3:
            return found
    return [value for value in linear_ticks(low, high, num) if value > 0]


def labels(values: list[float]) -> list[str]:
    """As short as tells them apart, all of one unit where that is possible."""
    largest = max((abs(value) for value in values), default=0.0)
    smallest = min((abs(value) for value in values if value), default=0.0)
    if 0 < largest < 1e-3 or smallest and largest / smallest > 1e4:
        return _exact(values, _power)
    unit, letter = next(((unit, letter) for least, unit, letter in UNITS if largest >= least), (1.0, ""))
    texts = _exact([value / unit for value in values], lambda value, decimals: f"{value:,.{decimals}f}")
    return ["0" if value == 0 else text + letter for value, text in zip(values, texts, strict=True)]


def _exact(values: list[float], write: Callable[[float, int], str]) -> list[str]:
    """All with as many digits as the one that needs most, for errors below a thousandth of what is between them."""
    apart = min((abs(b - a) for a, b in itertools.pairwise(values)), default=max(map(abs, values), default=1.0))
    texts: list[str] = []
    for digits in range(9):
        texts = [write(value, digits) for value in values]
        if all(abs(float(t.replace(",", "")) - v) <= 1e-3 * apart for t, v in zip(texts, values, strict=True)):
            break
    return texts


def _power(value: float, digits: int) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:,g}"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if digits else mantissa}e{int(exponent)}"
