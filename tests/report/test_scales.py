"""Ticks, numbers and fewer points, on cases that go wrong easily."""

import numpy as np
import pytest

from hybridlm.report.numbers import duration, num_bytes, number, percent, short
from hybridlm.report.scales import axis_of, labels
from hybridlm.report.series import running_mean, segments, spread, thinned


@pytest.mark.parametrize("low", [-5.0, 0.0, 1e-9, 0.5, 3.0, 1e6])
@pytest.mark.parametrize("width", [0.0, 1e-7, 0.01, 1.0, 37.0, 1e5, 1e12])
@pytest.mark.parametrize("from_zero", [False, True])
def test_ticks_are_few_round_within_and_told_apart(low: float, width: float, from_zero: bool) -> None:
    axis = axis_of(np.array([low, np.nan, low + width]), 0.0, 200.0, from_zero=from_zero)
    ticks = axis.ticks(5)
    assert 2 <= len(ticks) <= 11
    room = 1e-6 * (axis.high - axis.low)
    assert all(axis.low - room <= value <= axis.high + room for value, _ in ticks)
    texts = [text for _, text in ticks]
    assert len(set(texts)) == len(texts)
    ends = axis(np.array([low, low + width]))
    assert np.all((ends >= -1e-6) & (ends <= 200 + 1e-6))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.5, 1.0], ["0", "0.5", "1.0"]),
        ([0.0, 20000.0, 40000.0], ["0", "20k", "40k"]),
        ([1e6, 1.5e6], ["1.0M", "1.5M"]),
        ([500.0, 1000.0, 1500.0], ["500", "1,000", "1,500"]),
        ([1e-5, 2e-5], ["1e-5", "2e-5"]),
        ([9.5e-10, 1e-9, 1.05e-9], ["9.5e-10", "1e-9", "1.05e-9"]),
        ([0.01, 1.0, 1000.0], ["0.01", "1", "1,000"]),
    ],
)
def test_labels_are_short(values: list[float], texts: list[str]) -> None:
    assert labels(values) == texts


def test_numbers_are_as_people_write_them() -> None:
    written = [number(x) for x in (0, 7, 12345, 0.0, 2.0, 2.19, 1 / 3, 123456.7, 1e-5, -0.25, None, float("nan"), True)]
    assert written == ["0", "7", "12,345", "0", "2", "2.19", "0.3333", "123,457", "1e-5", "-0.25", "–", "–", "–"]
    assert [short(x) for x in (999, 1384064, 1e9, 12345, 0.5)] == ["999", "1.38 M", "1.00 B", "12.3 k", "0.5"]
    assert [num_bytes(x) for x in (0, 999, 1000, 48534040, 8e9)] == ["0 B", "999 B", "1 kB", "48.5 MB", "8 GB"]
    assert [duration(x) for x in (0.0124, 1.5, 59.4, 60, 3725, 90000)] == [
        *("12.4 ms", "1.5 s", "59.4 s", "1 min", "1 h 2 min", "1 d 1 h")
    ]
    assert [percent(x) for x in (0.1234, 1, None)] == ["12.3 %", "100.0 %", "–"]


def test_fewer_points_have_the_same_extremes_in_every_bucket(rng: np.random.Generator) -> None:
    x = np.sort(rng.choice(100_000, 7001, replace=False)).astype(float)
    y = rng.normal(size=7001)
    y[rng.random(7001) < 0.3] = np.nan
    xs, ys = thinned(x, y, 50)
    assert len(xs) <= 200 and xs[0] == x[0] and xs[-1] == x[-1] or np.isnan(y[[0, -1]]).any()
    edges = np.linspace(x[0], x[-1], 51)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside, kept = y[(x >= low) & (x < high)], ys[(xs >= low) & (xs < high)]
        assert np.nanmin(inside) == np.nanmin(kept) and np.nanmax(inside) == np.nanmax(kept)


def test_running_mean_is_the_mean_around(rng: np.random.Generator) -> None:
    y = rng.normal(size=41)
    y[[0, 7, 8, 9, 40]] = np.nan
    for width in (1, 4, 100):
        half = width // 2
        slow = [np.nanmean(y[max(n - half, 0) : n + half + 1]) if np.isfinite(y[n]) else np.nan for n in range(41)]
        np.testing.assert_allclose(running_mean(y, width), slow, atol=1e-12)


def test_segments_are_what_lies_between_gaps() -> None:
    nan = np.nan
    assert list(segments(np.array([nan, 1, 2, nan, nan, 3]))) == [slice(1, 3), slice(5, 6)]
    assert list(segments(np.array([nan]))) == []


def test_rows_are_spread_evenly_with_both_ends() -> None:
    assert spread(5, 9) == [0, 1, 2, 3, 4]
    assert spread(101, 5) == [0, 25, 50, 75, 100]
