"""Whole documents in windows, by first fit. Letters: d documents, p pieces of documents, w windows.

A document that is longer than a window fills windows of its own and leaves a rest; whatever is shorter goes into the
first of the windows that are still open that has room for it. So only what is longer than a window is ever cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Integer

from hybridlm.data.packing import Range, Stream

NUM_OPEN = 1024
"""Windows that wait for documents at once; more pad a little less, and hold documents from further apart."""


@dataclass(frozen=True)
class FirstFit:
    """Which pieces each window holds: those from `first[w]` up to `first[w + 1]`."""

    begins: Int64[np.ndarray, " p"]
    lengths: Int32[np.ndarray, " p"]
    first: Int64[np.ndarray, " w1"]

    def __len__(self) -> int:
        return len(self.first) - 1

    def ranges(self, index: int) -> Sequence[Range]:
        pieces = slice(self.first[index], self.first[index + 1])
        begins = self.begins[pieces].tolist()
        return [(begin, begin + length) for begin, length in zip(begins, self.lengths[pieces].tolist(), strict=True)]


def first_fit(stream: Stream, seq_len: int, num_open: int = NUM_OPEN) -> FirstFit:
    """The layout of `stream` in windows of `seq_len`; the same whenever it is asked for."""
    starts = stream.document_starts()
    lengths = np.diff(starts, append=stream.num_targets)
    whole, rest = lengths // seq_len, lengths % seq_len
    # Windows are numbered as they are opened, so a document's own come before that of its rest.
    num_whole, num_windows = np.cumsum(whole), 0
    windows = np.empty(len(lengths), np.int64)  # that each document's rest goes to, without counting whole ones
    opened: list[int] = []  # the document that each was opened for
    space = np.zeros(num_open, np.int64)
    window_in = np.zeros(num_open, np.int64)
    for document, length in enumerate(rest.tolist()):
        if length == 0:
            continue
        slot = int((space >= length).argmax())
        if space[slot] < length:
            # None has room: the fullest makes way for a new one.
            slot = int(space.argmin())
            space[slot], window_in[slot] = seq_len, num_windows
            opened.append(document)
            num_windows += 1
        space[slot] -= length
        windows[document] = window_in[slot]
    number = np.arange(num_windows) + num_whole[np.array(opened, np.int64)]
    has_rest = rest > 0
    whole_window, whole_begin = _whole_pieces(starts, whole, seq_len, number)
    window = np.concatenate([whole_window, number[windows[has_rest]]])
    begins = np.concatenate([whole_begin, (starts + whole * seq_len)[has_rest]])
    sizes = np.concatenate([np.full(len(whole_begin), seq_len), rest[has_rest]])
    return _by_window(window, begins, sizes, num_windows + int(whole.sum()))


def _whole_pieces(
    starts: Integer[np.ndarray, " d"], whole: Integer[np.ndarray, " d"], seq_len: int, taken: Integer[np.ndarray, " w"]
) -> tuple[Integer[np.ndarray, " p"], Integer[np.ndarray, " p"]]:
    """Window and beginning of each piece that fills a window; `taken` are the windows of the rests."""
    free = np.ones(len(taken) + int(whole.sum()), bool)
    free[taken] = False
    document = np.repeat(np.arange(len(whole)), whole)
    within = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    return np.flatnonzero(free), starts[document] + within * seq_len


def _by_window(
    window: Integer[np.ndarray, " p"], begins: Integer[np.ndarray, " p"], sizes: Integer[np.ndarray, " p"], num: int
) -> FirstFit:
    """Pieces in order of window, then of place in the stream; neighbours in both become one."""
    order = np.lexsort((begins, window))
    window, begins, sizes = window[order], begins[order], sizes[order]
    joined = np.zeros(len(window), bool)
    joined[1:] = (window[1:] == window[:-1]) & (begins[1:] == begins[:-1] + sizes[:-1])
    heads = np.flatnonzero(~joined)
    lengths = np.add.reduceat(sizes, heads) if len(heads) else sizes
    return FirstFit(
        begins=begins[heads].astype(np.int64),
        lengths=lengths.astype(np.int32),
        first=np.searchsorted(window[heads], np.arange(num + 1)).astype(np.int64),
    )
