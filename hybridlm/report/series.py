"""Values over steps, and fewer of them that look the same."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hybridlm.report.numbers import is_number

Record = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A line of a chart: `y` over `x`, both float64; NaN where a value is missing or was not finite."""

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    """Few values that each count, such as evaluations."""

    @property
    def last(self) -> float | None:
        """The last value that is one."""
        finite = self.y[np.isfinite(self.y)]
        return float(finite[-1]) if finite.size else None

    @property
    def median(self) -> float | None:
        finite = self.y[np.isfinite(self.y)]
        return float(np.median(finite)) if finite.size else None


def series_of(
    records: list[Record], name: str, *, label: str | None = None, x: str = "step", dots: bool = False
) -> Series | None:
    """`name` over `x`, of all records that have both; None where none has a finite value."""
    pairs = [(record[x], record[name]) for record in records if name in record and is_number(record.get(x))]
    if not any(is_number(value) for _, value in pairs):
        return None
    values = [value if is_number(value) else np.nan for _, value in pairs]
    return Series(
        name=label or name,
        x=np.array([at for at, _ in pairs], np.float64),
        y=np.array(values, np.float64),
        dots=dots,
    )


def running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values around each, up to `width` // 2 to either side; NaN stays NaN."""
    finite = np.isfinite(y)
    sums = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    counts = np.concatenate(([0], np.cumsum(finite)))
    place = np.arange(len(y))
    first, end = np.maximum(place - width // 2, 0), np.minimum(place + width // 2 + 1, len(y))
    return np.where(finite, (sums[end] - sums[first]) / np.maximum(counts[end] - counts[first], 1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """At most the first, lowest, highest and last value of each of `buckets` equal stretches of `x`.

    Drawn on so many pixels this is the same line. `x` increases. NaN in `y` is a gap, which stays where it fills a
    stretch.
    """
    if len(x) <= 2 * buckets:
        return x, y
    place = np.minimum(((x - x[0]) / (x[-1] - x[0]) * buckets).astype(int), buckets - 1)
    bounds = np.searchsorted(place, np.arange(buckets + 1))
    kept: list[int] = []
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        if first == end:
            continue
        inside = y[first:end]
        finite = np.flatnonzero(np.isfinite(inside))
        if finite.size:
            found = {finite[0], finite[np.argmin(inside[finite])], finite[np.argmax(inside[finite])], finite[-1]}
        else:
            found = {0}
        kept += sorted(int(first + n) for n in found)
    return x[kept], y[kept]


def segments(y: np.ndarray) -> Iterator[slice]:
    """Stretches without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], np.isfinite(y), [False])).astype(int)))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(first), int(end))


def spread(length: int, most: int) -> list[int]:
    """At most `most` indices, evenly, the first and the last among them."""
    return list(range(length)) if length <= most else sorted({round(n) for n in np.linspace(0, length - 1, most)})
