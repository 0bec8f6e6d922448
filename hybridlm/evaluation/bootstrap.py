"""Confidence intervals by resampling documents."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float

from hybridlm.config_check import ConfigError

LEVEL = 0.95

Sums = Mapping[str, Float[np.ndarray, " documents"]]


def intervals(
    sums: Sums, metrics: Callable[[Mapping[str, float]], Mapping[str, float]], *, num: int, seed: int = 0
) -> dict[str, float]:
    """`NAME_low` and `NAME_high` of each metric: the percentiles that hold 95 % of `num` replicates.

    `sums` are numbers of every document; a replicate draws as many documents with replacement, adds up their numbers,
    and `metrics` makes the values of a corpus of these sums (Efron and Tibshirani, 1993, chapter 13).

    Raises ConfigError where there are not two documents to draw from.
    """
    count = len(next(iter(sums.values())))
    if count < 2:
        raise ConfigError("--bootstrap", f"={num}: draws documents, and there is only {count}; give text of several")
    table = np.stack([np.asarray(values, np.float64) for values in sums.values()], axis=1)
    rng = np.random.default_rng(seed)
    replicates: dict[str, list[float]] = {}
    for _ in range(num):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        for name, value in metrics(dict(zip(sums, (times @ table).tolist(), strict=True))).items():
            replicates.setdefault(name, []).append(value)
    tail = (1 - LEVEL) / 2
    found: dict[str, float] = {}
    for name, values in replicates.items():
        low, high = np.quantile(values, [tail, 1 - tail])
        found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found
