"""Documents to windows of one length. Letters: n stream, d documents, t time.

The stream is, for every document, one `end_id` and then its tokens; one more `end_id` closes it. So `end_id` ends each
document as a target. As an input `begin_id` takes its place, which is the same token for many tokenizers, and makes a
document's first token a prediction too. However windows are laid out over the stream, within an epoch every token of
text is a target exactly once, and so is the end of every document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, Integer, Shaped, UInt, UInt8

from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import Tokenizer

Window = dict[str, Shaped[np.ndarray, " t"]]
Read = tuple[Integer[np.ndarray, " n"], Integer[np.ndarray, " n"], Integer[np.ndarray, " d"]]
Range = tuple[int, int]

FIELDS: dict[str, type[np.generic]] = {
    **dict.fromkeys(("tokens", "targets", "segment_ids", "positions", "target_bytes"), np.int32),
    "loss_weight": np.float32,
}
"""Of a window, and so of a batch, with their dtypes; `Windows` says what they hold."""


@runtime_checkable
class Stream(Protocol):
    """Tokenised documents, one after the other, in memory or in files."""

    @property
    def end_id(self) -> int: ...

    @property
    def num_targets(self) -> int:
        """Predictions in one epoch: all tokens of text and the ends of the documents."""
        ...

    def read(self, begin: int, end: int) -> Read:
        """Tokens `begin` to `end` of the `num_targets + 1`, the bytes of text each stands for (0 for `end_id`), and
        where in them documents start, counted from `begin`."""
        ...

    def loss_weights(self, begin: int, end: int) -> UInt8[np.ndarray, " n"] | int:
        """What tokens `begin` to `end` count in losses where they are targets."""
        ...

    def document_starts(self) -> Int64[np.ndarray, " d"]:
        """Where each document's first `end_id` stands."""
        ...


@dataclass(frozen=True)
class TokenStream:
    """A stream in memory, or in files that are mapped into it."""

    tokens: UInt[np.ndarray, " n"]
    num_bytes: UInt[np.ndarray, " n"]
    starts: Int64[np.ndarray, " d"]
    end_id: int
    weights: UInt8[np.ndarray, " n"] | None = None
    """Of tokens as targets; all 1 where it is absent."""

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    def read(self, begin: int, end: int) -> Read:
        first, last = np.searchsorted(self.starts, [begin, end])
        return self.tokens[begin:end], self.num_bytes[begin:end], self.starts[first:last] - begin

    def loss_weights(self, begin: int, end: int) -> UInt8[np.ndarray, " n"] | int:
        return 1 if self.weights is None else self.weights[begin:end]

    def document_starts(self) -> Int64[np.ndarray, " d"]:
        return self.starts

    def __reduce__(self) -> tuple[Any, ...]:
        # NumPy would pickle what a file holds, not that it is one.
        arrays = (self.tokens, self.num_bytes, self.starts)
        weights = () if self.weights is None else (self.weights,)
        return _unpickled, (*(_file_of(array) or array for array in arrays), self.end_id, *weights)


def _file_of(array: np.ndarray) -> Path | None:
    """The .npy file that `array` is all of."""
    file = array.filename if isinstance(array, np.memmap) else None
    return None if file is None else Path(file)


def _unpickled(tokens: Any, num_bytes: Any, starts: Any, end_id: int, weights: Any = None) -> TokenStream:
    arrays = (np.load(a, mmap_mode="r") if isinstance(a, Path) else a for a in (tokens, num_bytes, starts))
    return TokenStream(*arrays, end_id=end_id, weights=weights)


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """The stream of `documents` in their order, in the smallest dtypes that hold it."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end, no_bytes = np.array([tokenizer.end_id], dtype), np.zeros(1, np.uint8)
    tokens, num_bytes, starts, position = [], [], [], 0
    for document in documents:
        ids, lengths = tokenizer.encode_with_lengths(document.text)
        tokens += [end, ids.astype(dtype)]
        num_bytes += [no_bytes, lengths.astype(np.min_scalar_type(lengths.max(initial=0)))]
        starts.append(position)
        position += 1 + len(ids)
    return TokenStream(
        tokens=np.concatenate([*tokens, end]),
        num_bytes=np.concatenate([*num_bytes, no_bytes]),
        starts=np.array(starts, np.int64),
        end_id=tokenizer.end_id,
    )


class Examples(Protocol):
    """Windows, each a function of its index."""

    @property
    def seq_len(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Window: ...

    def padding(self) -> Window:
        """A window of padding only."""
        ...


class Layout(Protocol):
    """Which ranges of the stream's predictions each window holds."""

    def __len__(self) -> int: ...

    def ranges(self, index: int) -> Sequence[Range]:
        """Of window `index`, in order; together no longer than a window."""
        ...


@dataclass(frozen=True)
class Consecutive:
    """Documents concatenated, then split: windows follow each other in the stream, and the last one is shorter."""

    num_targets: int
    seq_len: int

    def __len__(self) -> int:
        return -(-self.num_targets // self.seq_len)

    def ranges(self, index: int) -> Sequence[Range]:
        begin = index * self.seq_len
        return [(begin, min(begin + self.seq_len, self.num_targets))]


class Windows:
    """Training examples: up to `seq_len` inputs and the tokens after them; each a function of its index.

    What a window lacks is padded, nothing is dropped. Nothing is copied until a window is asked for.
    """

    def __init__(self, stream: Stream, seq_len: int, layout: Layout | None = None, begin_id: int | None = None):
        """`layout` is `Consecutive` where it is absent, and `begin_id`, the first input of documents, `end_id`."""
        self.stream = stream
        self.seq_len = seq_len
        self.layout: Layout = Consecutive(stream.num_targets, seq_len) if layout is None else layout
        self.begin_id = stream.end_id if begin_id is None else begin_id

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def padding_fraction(self) -> float:
        """Of all positions of an epoch."""
        return 1 - self.stream.num_targets / (len(self) * self.seq_len)

    def __getitem__(self, index: int) -> Window:
        """Window `index`, arrays of length `seq_len`.

        tokens, targets: int32, `end_id` on padding;
        segment_ids: int32, 1, 2, ... per document in the window, 0 on padding;
        positions: int32, 0, 1, ... from the start of each document or of its part in the window;
        loss_weight: float32, what targets count (1, or what the stream says of them), 0 on padding;
        target_bytes: int32, bytes of text that the target stands for.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = padding_window(self.stream.end_id, self.seq_len)
        new_document = np.zeros(self.seq_len, np.int32)
        at = 0
        for begin, end in self.layout.ranges(int(index)):
            tokens, num_bytes, starts = self.stream.read(begin, end + 1)
            after = at + end - begin
            window["tokens"][at:after] = tokens[:-1]
            window["targets"][at:after] = tokens[1:]
            window["target_bytes"][at:after] = num_bytes[1:]
            window["loss_weight"][at:after] = self.stream.loss_weights(begin + 1, end + 1)
            starts = at + starts[starts < end - begin]
            window["tokens"][starts] = self.begin_id
            new_document[at] = 1
            new_document[starts] = 1
            at = after
        time = np.arange(at, dtype=np.int32)
        window["segment_ids"][:at] = np.cumsum(new_document[:at])
        window["positions"][:at] = time - np.maximum.accumulate(time * new_document[:at])
        return window

    def padding(self) -> Window:
        """A window of padding only."""
        return padding_window(self.stream.end_id, self.seq_len)


class JoinedWindows:
    """The windows of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Windows]):
        assert len({part.seq_len for part in parts}) == 1
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Window:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        k = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[k][int(index) - int(self._ends[k]) + len(self.parts[k])]

    def padding(self) -> Window:
        return self.parts[0].padding()


def padding_window(end_id: int, seq_len: int) -> Window:
    """All fields of padding alone."""
    window = {name: np.zeros(seq_len, dtype) for name, dtype in FIELDS.items()}
    window["tokens"][:] = window["targets"][:] = end_id
    return window
