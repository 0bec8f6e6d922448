"""A corpus from its config, and batches of it as global arrays. Letters: b batch, t time.

The order is a pure function of (seed, step): row r of step s is sample s * batch_size + r of one endless shuffled
sequence. It does not depend on hosts, mesh or prefetching; each host reads only the rows that its own devices hold.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int64, Shaped

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.packing import TokenStream, Window, Windows
from hybridlm.data.sources import Document, read_documents, split_documents
from hybridlm.data.token_cache import cached_tokenize, content_hash
from hybridlm.data.tokenizers import Tokenizer, load_tokenizer

Batch = dict[str, jax.Array]


@dataclass(frozen=True)
class Corpus:
    """Text of a run, ready to be drawn from."""

    train: Windows
    validation: Windows
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of texts, split, tokenizer and seq_len: where it differs, a run must not resume."""
    description: str
    """One line for people."""
    validation_documents: tuple[Document, ...]

    def validation_bytes(self) -> bytes:
        """The held-out text as it was read, for baselines on the same bytes."""
        return b"".join(document.text for document in self.validation_documents)


def load_corpus(data: config.Data) -> Corpus:
    """Read, split, tokenise and window the corpus that `data` describes.

    Raises:
        ConfigError: there is no usable text, or less of it for training than one sequence.
    """
    corpus = _corpus(data, *split_documents(read_documents(data), data.validation_fraction))
    num_targets = corpus.train.stream.num_targets
    if num_targets < data.seq_len:
        raise ConfigError(
            "data.seq_len",
            f"={data.seq_len}: the training text has only {num_targets} tokens; seq_len may be at most {num_targets}, "
            "or add text",
        )
    return corpus


def load_whole(data: config.Data) -> Corpus:
    """Like `load_corpus`, but all of the text is held out and none is for training."""
    return _corpus(data, [], read_documents(data))


def _corpus(data: config.Data, train: list[Document], validation: list[Document]) -> Corpus:
    tokenizer = load_tokenizer(data.tokenizer)
    train_stream, validation_stream = cached_tokenize(train, tokenizer), cached_tokenize(validation, tokenizer)
    parts = (
        tokenizer.fingerprint,
        str(tokenizer.end_id),
        str(data.seq_len),
        content_hash(train),
        content_hash(validation),
    )
    return Corpus(
        train=Windows(train_stream, data.seq_len),
        validation=Windows(validation_stream, data.seq_len),
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
        description=_description(data, tokenizer, [*train, *validation], train_stream, validation_stream),
        validation_documents=tuple(validation),
    )


class Batches:
    """Endless training batches, each field [batch_size, seq_len] as one global array; reshuffled every epoch.

    `sharding` spreads the batch axis over devices, of any number of hosts; None means the default device.
    `state()` is the same on all hosts, and `set_state` continues exactly after the last batch that was handed out.
    """

    def __init__(
        self,
        windows: Windows,
        *,
        batch_size: int,
        seed: int,
        sharding: NamedSharding | None,
        prefetch: int,
        start_step: int = 0,
    ):
        self.batch_size, self.seed, self.sharding = batch_size, seed, sharding
        self._rows = local_rows(sharding, batch_size, windows.seq_len)
        steps = grain.MapDataset.source(StepRows(windows, batch_size=batch_size, seed=seed, rows=self._rows))
        # One thread: windows are cheap to cut, and more threads only fight over the interpreter lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        self._iterator = iter(steps.to_iter_dataset(options))
        self._seek(start_step)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return _assemble(next(self._iterator), self._rows, self.batch_size, self.sharding)

    def state(self) -> dict[str, int]:
        """JSON-able position: that of the next batch."""
        return {
            "next_step": self._iterator.get_state()["next_index"],
            "seed": self.seed,
            "batch_size": self.batch_size,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ConfigError: it belongs to another seed or batch size, that is to another order.
        """
        for name in ("seed", "batch_size"):
            mine, theirs = getattr(self, name), int(state[name])
            if mine != theirs:
                raise ConfigError(
                    f"train.{name}",
                    f"={mine}: the checkpoint's data order was made with {theirs}; set it back, or start a new run",
                )
        self._seek(int(state["next_step"]))

    def close(self) -> None:
        """Stop reading ahead."""
        self._iterator.close()

    def _seek(self, step: int) -> None:
        self._iterator.set_state({"next_index": step})


class StepRows:
    """Random access by step to one host's rows of the shuffled batches, as NumPy arrays."""

    def __init__(self, windows: Windows, *, batch_size: int, seed: int, rows: Int64[np.ndarray, " r"]):
        # Grain's default number of steps is endless, and its shuffle reshuffles each pass of the windows.
        self._samples = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        self._batch_size, self._rows = batch_size, rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size

    def __getitem__(self, index: int) -> dict[str, Shaped[np.ndarray, "r t"]]:
        samples = [self._samples[index * self._batch_size + int(row)] for row in self._rows]
        return _stack(cast(list[Window], samples))


def evaluation_batches(
    windows: Windows, *, batch_size: int, sharding: NamedSharding | None, limit: int | None
) -> Iterator[Batch]:
    """The windows in order, or `limit` batches spread evenly over them; the last batch is filled up with padding."""
    rows = local_rows(sharding, batch_size, windows.seq_len)
    wanted = len(windows) if limit is None else min(len(windows), limit * batch_size)
    chosen = np.arange(wanted) * len(windows) // wanted
    for first in range(0, wanted, batch_size):
        indices = [first + int(row) for row in rows]
        local = _stack([windows[int(chosen[i])] if i < wanted else windows.padding() for i in indices])
        yield _assemble(local, rows, batch_size, sharding)


def local_rows(sharding: NamedSharding | None, batch_size: int, seq_len: int) -> Int64[np.ndarray, " r"]:
    """Rows of the global batch that this host's devices hold, ascending."""
    if sharding is None:
        return np.arange(batch_size)
    held = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size, seq_len)).values():
        assert index is not None
        held[index[0]] = True
    return np.flatnonzero(held)


def _stack(windows: list[Window]) -> dict[str, Shaped[np.ndarray, "r t"]]:
    return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def _assemble(
    local: Mapping[str, np.ndarray], rows: Int64[np.ndarray, " r"], batch_size: int, sharding: NamedSharding | None
) -> Batch:
    """Global arrays of which `local` holds `rows`."""
    if sharding is None:
        return jax.device_put(dict(local))

    def globally(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return array[first : first + stop - start, *index[1:]]

        return jax.make_array_from_callback((batch_size, array.shape[1]), sharding, part)

    return {name: globally(array) for name, array in local.items()}


def _description(
    data: config.Data, tokenizer: Tokenizer, documents: list[Document], train: TokenStream, validation: TokenStream
) -> str:
    where = data.source if data.path is None else f"{data.source} {data.path}"
    megabytes = sum(len(document.text) for document in documents) / 1e6
    return (
        f"{where}: {len(documents):,} documents, {megabytes:,.1f} MB; "
        f"tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids); "
        f"{train.num_targets:,} tokens to train on, {validation.num_targets:,} held out"
    )
