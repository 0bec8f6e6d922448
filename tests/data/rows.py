"""Batches as NumPy arrays."""

import numpy as np

from hybridlm.data.pipeline import Batches

Rows = list[dict[str, np.ndarray]]


def draw(batches: Batches, count: int) -> Rows:
    """The next batches, and no more are prepared."""
    drawn = [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(count)]
    batches.close()
    return drawn


def assert_same(ours: Rows, theirs: Rows) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
