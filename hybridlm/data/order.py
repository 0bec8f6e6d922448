"""Which window each row of each batch holds: a pure function of the seed and the number of the batch.

Row r of batch b is sample b * batch_size + r of one endless sequence. The mixture says which source the sample comes
from and how many of that source came before; each source goes through its windows once per epoch, in an order of that
epoch's own. Nothing here needs JAX, so worker processes never touch a device.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Shaped

from hybridlm.data.mixture import Proportions, Stage
from hybridlm.data.packing import Examples, Window
from hybridlm.data.permutation import keys_of, permuted

ORDER = 2
"""Goes up when the same config gives another order, so that older checkpoints are refused instead of mixed up."""


@dataclass(frozen=True)
class Source:
    """One source of the training text."""

    name: str
    windows: Examples
    fingerprint: str
    """Of its windows: text, tokenizer, seq_len, packing."""


@dataclass(frozen=True)
class Mixture:
    """Sources, and how many places each has in a period from a batch on; the first stage is from batch 0 on."""

    sources: tuple[Source, ...]
    stages: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def seq_len(self) -> int:
        return self.sources[0].windows.seq_len

    def proportions(self, batch_size: int) -> Proportions:
        return Proportions([Stage(first * batch_size, places) for first, places in self.stages])


def only(windows: Examples, name: str = "data", fingerprint: str = "") -> Mixture:
    """The mixture of one source."""
    return Mixture((Source(name, windows, fingerprint),), ((0, (1,)),))


class Place(NamedTuple):
    """Where a sample is found."""

    source: int
    epoch: int
    window: int


class Order:
    """Samples of all sources in their order, numbered from 0."""

    def __init__(self, sources: Sequence[Source], proportions: Proportions, seed: int):
        self.sources, self.proportions, self.seed = tuple(sources), proportions, seed
        self.lengths: Int64[np.ndarray, " k"] = np.array([len(source.windows) for source in sources])

    def place(self, sample: int) -> Place:
        k, index = self.proportions.locate(sample)
        num_windows = int(self.lengths[k])
        epoch, index = divmod(index, num_windows)
        return Place(k, epoch, permuted(index, num_windows, keys_of(self.seed, k, epoch)))

    def window(self, sample: int) -> Window:
        k, _, window = self.place(sample)
        return self.sources[k].windows[window]


class BatchRows:
    """Random access to one host's rows of the batches that follow `position` and are not skipped."""

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        rows: Int64[np.ndarray, " r"],
        position: int = -1,
        skipped: Sequence[tuple[int, int]] = (),
    ):
        self._order, self._batch_size, self._rows = order, batch_size, rows
        self._position, self._skipped = position, tuple(skipped)

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> dict[str, Shaped[np.ndarray, "r t"]]:
        first = nth_kept(self._position, index, self._skipped) * self._batch_size
        return stack([self._order.window(first + int(row)) for row in self._rows])


def nth_kept(position: int, n: int, skipped: Sequence[tuple[int, int]]) -> int:
    """Number n, from 0, of those batches after `position` that are in none of the ranges, which ascend."""
    batch = position + 1 + n
    for first, last in skipped:
        if last > position and first <= batch:
            batch += last - max(first, position + 1) + 1
    return batch


def stack(windows: Sequence[Window]) -> dict[str, Shaped[np.ndarray, "r t"]]:
    """The rows of a batch."""
    return {name: np.stack([window[name] for window in windows]) for name in windows[0]}
