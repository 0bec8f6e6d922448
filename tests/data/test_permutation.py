"""That orders are orders, and that they look like those of shuffled cards."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.data.permutation import keys_of, permuted


@given(st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_everything_is_somewhere_once(num: int, seed: int) -> None:
    assert sorted(permuted(i, num, keys_of(seed)) for i in range(num)) == list(range(num))


def test_one_of_very_many_is_found_at_once() -> None:
    found = {permuted(i, 10**15, keys_of(1)) for i in range(1000)}
    assert len(found) == 1000 and max(found) < 10**15
    assert np.mean(list(found)) == pytest.approx(10**15 / 2, rel=0.1)


@pytest.mark.parametrize("num", [2, 3, 6, 11, 30])
def test_each_place_is_as_likely_for_each_thing(num: int) -> None:
    """What shuffled cards exceed once in ten thousand times."""
    counts, trials = np.zeros((num, num)), 300 * num
    for seed in range(trials):
        for i in range(num):
            counts[i, permuted(i, num, keys_of(seed, num))] += 1
    expected, freedom = trials / num, (num - 1) ** 2
    # Rows and columns have fixed sums: so scaled it is chi-squared.
    statistic = (num - 1) / num * ((counts - expected) ** 2 / expected).sum()
    assert statistic < freedom + 6 * np.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("num", [5, 100, 1001])
def test_neighbours_do_not_stay_together(num: int) -> None:
    """Of a random order, on average one neighbour in num - 1 pairs follows its neighbour."""
    together = trials = 0
    for seed in range(20_000 // num):
        order = [permuted(i, num, keys_of(seed)) for i in range(num)]
        together += sum(b == a + 1 for a, b in zip(order, order[1:], strict=False))
        trials += 1
    mean = trials * (num - 1) / num
    assert abs(together - mean) < 5 * np.sqrt(mean)


def test_orders_of_many_seeds_are_as_many() -> None:
    orders = {tuple(permuted(i, 5, keys_of(seed)) for i in range(5)) for seed in range(3000)}
    assert len(orders) == 120
