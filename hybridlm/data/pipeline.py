"""Batches of a corpus as global arrays. Letters: b batch, t time, r rows, k sources.

The order is `hybridlm.data.order`'s: a pure function of the seed and the number of the batch. It does not depend on
hosts, mesh, prefetching or worker processes; each host reads only the rows that its own devices hold. All that a
checkpoint keeps of it is the position, and the batches that shall never be handed out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int64

from hybridlm.config_check import ConfigError
from hybridlm.data.arrays import Batch, assemble, local_rows
from hybridlm.data.order import ORDER, BatchRows, Mixture, Order, nth_kept, stack
from hybridlm.data.packing import Examples
from hybridlm.data.workers import Reader


class Batches:
    """Endless training batches, each field [batch_size, seq_len] as one global array; reshuffled every epoch.

    `sharding` spreads the batch axis over devices, of any number of hosts; None means the default device. `workers`
    processes prepare batches, a thread where there are none. `state()` is the same on all hosts, and `set_state`
    continues exactly after the last batch that was handed out, with any sharding and number of workers.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        seed: int,
        sharding: NamedSharding | None,
        prefetch: int,
        workers: int = 0,
    ):
        self.mixture, self.batch_size, self.seed, self.sharding = mixture, batch_size, seed, sharding
        self.position = -1
        """Number, in the order of the data, of the last batch that was handed out."""
        self._prefetch, self._workers = prefetch, workers
        self._rows = local_rows(sharding, batch_size, mixture.seq_len)
        self._order = Order(mixture.sources, mixture.proportions(batch_size), seed)
        self._skipped: list[tuple[int, int]] = []
        self._ahead: Reader | None = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._ahead is None:
            rows = BatchRows(
                self._order,
                batch_size=self.batch_size,
                rows=self._rows,
                position=self.position,
                skipped=self._skipped,
            )
            self._ahead = Reader(rows, prefetch=self._prefetch, workers=self._workers)
        local = next(self._ahead)
        self.position = nth_kept(self.position, 0, self._skipped)
        return assemble(local, self._rows, self.batch_size, self.sharding)

    def skip(self, first: int, last: int) -> None:
        """Never hand out batches `first` to `last`, all of them after `position`; part of `state()` from now on."""
        if not self.position < first <= last:
            raise ValueError(f"cannot skip batches {first} to {last} after batch {self.position} was handed out")
        self.close()
        self._skipped = _union([*self._skipped, (first, last)])

    def state(self) -> dict[str, Any]:
        """JSON-able: the position, what is skipped, and what the order is made of."""
        return {
            "order": ORDER,
            "position": self.position,
            "skipped": [list(batches) for batches in self._skipped],
            "seed": self.seed,
            "batch_size": self.batch_size,
            "sources": [[source.name, source.fingerprint] for source in self.mixture.sources],
            "stages": [[first, list(places)] for first, places in self.mixture.stages],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ConfigError: it belongs to another order: another seed, batch size, text, or weights before its position.
        """
        if state.get("order") != ORDER:
            raise ConfigError(
                "data",
                ": the checkpoint's batches were put in order by another version of hybridlm; go on with that version, "
                "or start a new run",
            )
        for name in ("seed", "batch_size"):
            mine, theirs = getattr(self, name), int(state[name])
            if mine != theirs:
                raise ConfigError(
                    f"train.{name}",
                    f"={mine}: the checkpoint's data order was made with {theirs}; set it back, or start a new run",
                )
        position = int(state["position"])
        self._check_mixture(state, position)
        self.close()
        self.position = position
        self._skipped = [(int(first), int(last)) for first, last in state["skipped"]]

    def progress(self) -> dict[str, float]:
        """Of each source: `tokens/NAME` of the batches handed out so far, padding counted as in `tokens` of a step, and
        `epoch/NAME`, how often it has been gone through, what was skipped counted too.
        """
        before = self._counts(self.position + 1)
        drawn = before.copy()
        for first, last in self._skipped:
            if first <= self.position:
                drawn -= self._counts(last + 1) - self._counts(first)
        tokens = drawn * self.mixture.seq_len
        names = [source.name for source in self.mixture.sources]
        epochs = before / self._order.lengths
        return {f"tokens/{name}": int(n) for name, n in zip(names, tokens, strict=True)} | {
            f"epoch/{name}": float(n) for name, n in zip(names, epochs, strict=True)
        }

    def repeated(self) -> dict[str, int]:
        """Sources that the last batch, or what was skipped before it, began anew, with their epoch: 2 is the second."""
        lengths = self._order.lengths
        behind = {last + 1: first for first, last in self._skipped}.get(self.position, self.position)
        before, after = self._counts(behind), self._counts(self.position + 1)
        epochs = -(-after // lengths)
        begun = (epochs > -(-before // lengths)) & (epochs > 1)
        return {self.mixture.sources[k].name: int(epochs[k]) for k in np.flatnonzero(begun)}

    def epochs(self, num_batches: int) -> dict[str, float]:
        """How often the first `num_batches` go through each source."""
        counts = self._counts(num_batches) / self._order.lengths
        return {source.name: float(n) for source, n in zip(self.mixture.sources, counts, strict=True)}

    def close(self) -> None:
        """Stop reading ahead; the next batch begins anew, behind the last that was handed out."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _counts(self, num_batches: int) -> Int64[np.ndarray, " k"]:
        return self._order.proportions.counts(max(num_batches, 0) * self.batch_size)

    def _check_mixture(self, state: Mapping[str, Any], position: int) -> None:
        mine, theirs = [source.name for source in self.mixture.sources], [name for name, _ in state["sources"]]
        if mine != theirs:
            raise ConfigError(
                "data",
                f": the checkpoint's run read {', '.join(theirs)}, and this one {', '.join(mine)}; set it back, or "
                "start a new run",
            )
        for source, (_, fingerprint) in zip(self.mixture.sources, state["sources"], strict=True):
            if source.fingerprint != fingerprint:
                raise ConfigError(
                    "data",
                    f": {source.name} is other text than the checkpoint's run read, or has another tokenizer, seq_len "
                    "or packing; set it back, or start a new run",
                )
        # What was drawn so far must stay as it was; later weights are free to change.
        used = [[first, list(places)] for first, places in self.mixture.stages if first <= position]
        if used != [stage for stage in state["stages"] if stage[0] <= position]:
            raise ConfigError(
                "data.stages",
                f": the checkpoint's {position + 1:,} batches were drawn with other weights; set them back, and let "
                "new ones begin later",
            )


def evaluation_batches(
    windows: Examples, *, batch_size: int, sharding: NamedSharding | None, limit: int | None
) -> Iterator[Batch]:
    """The windows in order, or `limit` batches spread evenly over them; the last batch is filled up with padding."""
    rows = local_rows(sharding, batch_size, windows.seq_len)
    wanted = len(windows) if limit is None else min(len(windows), limit * batch_size)
    chosen = np.arange(wanted) * len(windows) // wanted
    for first in range(0, wanted, batch_size):
        indices = [first + int(row) for row in rows]
        local = stack([windows[int(chosen[i])] if i < wanted else windows.padding() for i in indices])
        yield assemble(local, rows, batch_size, sharding)


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges with a gap between any two."""
    union: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if union and first <= union[-1][1] + 1:
            union[-1] = union[-1][0], max(last, union[-1][1])
        else:
            union.append((first, last))
    return union
