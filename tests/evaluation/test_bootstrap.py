"""Intervals of a mean against its standard error."""

import numpy as np
import pytest

from hybridlm.config_check import ConfigError
from hybridlm.evaluation.bootstrap import intervals


def ratio(sums: dict[str, float]) -> dict[str, float]:
    return {"mean": sums["x"] / sums["n"]}


def test_intervals_of_a_mean_are_two_standard_errors_wide(rng: np.random.Generator) -> None:
    x = rng.normal(3.0, 2.0, size=400)
    sums = {"x": x, "n": np.ones(400)}
    found = intervals(sums, ratio, num=2000)
    error = x.std() / 20
    # The percentiles of 2,000 replicates are within about 0.1 standard errors.
    assert found["mean_low"] == pytest.approx(x.mean() - 1.96 * error, abs=0.25 * error)
    assert found["mean_high"] == pytest.approx(x.mean() + 1.96 * error, abs=0.25 * error)
    assert intervals(sums, ratio, num=50, seed=1) == intervals(sums, ratio, num=50, seed=1)
    assert intervals(sums, ratio, num=50, seed=1) != intervals(sums, ratio, num=50, seed=2)


def test_one_document_has_no_interval() -> None:
    with pytest.raises(ConfigError, match="--bootstrap=5: draws documents, and there is only 1"):
        intervals({"x": np.ones(1), "n": np.ones(1)}, ratio, num=5)
