"""Proportions of a mixture against a loop that counts, sample by sample."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.data.mixture import LONGEST_PERIOD, Proportions, Stage, interleave, quantise

some_places = st.lists(st.integers(0, 23), min_size=1, max_size=7).filter(any)


def named(weights: Sequence[float]) -> dict[str, float]:
    return {f"part {k}": weight for k, weight in enumerate(weights)}


@given(some_places)
def test_of_any_first_samples_each_source_has_its_share_within_one(places: list[int]) -> None:
    period = sum(places)
    counts = np.cumsum(interleave(places)[:, None] == np.arange(len(places)), axis=0)
    assert counts[-1].tolist() == places
    owed = np.arange(1, period + 1)[:, None] * np.array(places)  # times the period, so that all is in whole numbers
    assert (abs(counts * period - owed) < period).all()


@given(
    st.integers(1, 5).flatmap(
        lambda k: st.lists(st.lists(st.integers(0, 9), min_size=k, max_size=k).filter(any), min_size=1, max_size=4)
    ),
    st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
def test_stages_go_on_from_the_counts_of_those_before(all_places: list[list[int]], lengths: list[int]) -> None:
    firsts = np.cumsum([0, *lengths])[: len(all_places)].tolist()
    stages = [Stage(first, tuple(places)) for first, places in zip(firsts, all_places, strict=True)]
    proportions = Proportions(stages)
    seen = [0] * len(all_places[0])
    for sample in range(firsts[-1] + 60):
        assert proportions.counts(sample).tolist() == seen
        stage = max((s for s in stages if s.first_sample <= sample), key=lambda s: s.first_sample)
        turns = interleave(stage.places)
        source = int(turns[(sample - stage.first_sample) % len(turns)])
        assert proportions.locate(sample) == (source, seen[source])
        seen[source] += 1


def test_counts_far_along_need_no_more_than_arithmetic() -> None:
    proportions = Proportions([Stage(0, (7, 3)), Stage(10**15, (1, 1))])
    assert proportions.counts(10**15).tolist() == [7 * 10**14, 3 * 10**14]
    assert proportions.counts(3 * 10**15).tolist() == [17 * 10**14, 13 * 10**14]
    source, index = proportions.locate(3 * 10**15)
    assert index == [17 * 10**14, 13 * 10**14][source]


@pytest.mark.parametrize(
    ("weights", "places"),
    [
        ([1.0], (1,)),
        ([0.7, 0.3], (7, 3)),
        ([70.0, 30.0], (7, 3)),
        ([1 / 3, 1 / 3, 1 / 3], (1, 1, 1)),
        ([0.1] * 10, (1,) * 10),
        ([2.0, 0.0, 1.0], (2, 0, 1)),
        ([0.55, 0.25, 0.2], (11, 5, 4)),
    ],
)
def test_simple_weights_are_exact_in_the_shortest_period(weights: list[float], places: tuple[int, ...]) -> None:
    assert quantise(named(weights)) == places


@given(st.lists(st.floats(0.01, 1e6), min_size=1, max_size=9).filter(lambda w: min(w) / sum(w) > 1e-4))
def test_other_weights_are_within_half_a_place_or_so(weights: list[float]) -> None:
    places = quantise(named(weights))
    total = sum(map(Fraction, weights))
    assert sum(places) <= LONGEST_PERIOD
    for weight, n in zip(weights, places, strict=True):
        assert abs(Fraction(n, sum(places)) - Fraction(weight) / total) <= Fraction(1, LONGEST_PERIOD)


def test_a_share_too_small_for_one_place_is_named() -> None:
    with pytest.raises(ValueError, match=r"^part 1 has a share of 1e-05; the smallest is 1 in 65,536, or 0 for none$"):
        quantise(named([0.99999, 0.00001]))
