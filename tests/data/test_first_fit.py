"""First-fit packing against a loop over documents and open windows, and what it promises of tokens."""

import random

import numpy as np
import pytest

from hybridlm.data.first_fit import first_fit
from hybridlm.data.packing import TokenStream, Windows, tokenize
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer

END = ByteTokenizer.end_id
LENGTHS = [[1], [5, 1, 1, 30, 2], [36, 37, 38, 6, 7], [100], [16] * 5, [15] * 5, [3, 200, 4, 1, 60, 2, 2, 9]]


def stream_of(lengths: list[int], seed: int = 0) -> tuple[list[Document], TokenStream]:
    rng = random.Random(seed)
    documents = [Document(f"d{i}", rng.randbytes(n)) for i, n in enumerate(lengths)]
    return documents, tokenize(documents, ByteTokenizer())


def pieces_by_loop(documents: list[Document], seq_len: int, num_open: int) -> list[list[list[tuple[int, int]]]]:
    """Windows as lists of pieces, each a list of (input, target) pairs, in the order in which they were opened."""
    windows: list[list[list[tuple[int, int]]]] = []
    slots: list[list[list[tuple[int, int]]] | None] = [None] * num_open
    for document in documents:
        pairs = list(zip([END, *document.text], [*document.text, END], strict=True))
        while len(pairs) >= seq_len:
            windows.append([pairs[:seq_len]])
            pairs = pairs[seq_len:]
        if not pairs:
            continue
        room = [0 if window is None else seq_len - sum(map(len, window)) for window in slots]
        fitting = [i for i, free in enumerate(room) if free >= len(pairs)]
        if fitting:
            window = slots[fitting[0]]
            assert window is not None
            window.append(pairs)
        else:
            slots[room.index(min(room))] = window = [pairs]
            windows.append(window)
    return windows


@pytest.mark.parametrize("num_open", [1, 2, 64])
@pytest.mark.parametrize("seq_len", [2, 16, 37])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_equal_a_loop_over_documents(lengths: list[int], seq_len: int, num_open: int) -> None:
    documents, stream = stream_of(lengths)
    windows = Windows(stream, seq_len, first_fit(stream, seq_len, num_open))
    expected = pieces_by_loop(documents, seq_len, num_open)
    assert len(windows) == len(expected)
    for index, pieces in enumerate(expected):
        window = windows[index]
        pairs = [pair for piece in pieces for pair in piece]
        padding = seq_len - len(pairs)
        assert window["tokens"].tolist() == [i for i, _ in pairs] + [END] * padding
        assert window["targets"].tolist() == [t for _, t in pairs] + [END] * padding
        segments = [number for number, piece in enumerate(pieces, 1) for _ in piece]
        assert window["segment_ids"].tolist() == segments + [0] * padding
        assert window["positions"].tolist() == [p for piece in pieces for p in range(len(piece))] + [0] * padding
        assert window["loss_weight"].tolist() == [1.0] * len(pairs) + [0.0] * padding
        assert window["target_bytes"].tolist() == [int(t != END) for _, t in pairs] + [0] * padding


def test_every_byte_of_text_is_a_target_exactly_once_per_epoch() -> None:
    documents, stream = stream_of(random.Random(1).choices(range(1, 90), k=300))
    layout = first_fit(stream, 31)
    times_a_target = np.zeros(stream.num_targets, int)
    for index in range(len(layout)):
        for begin, end in layout.ranges(index):
            times_a_target[begin:end] += 1
    assert (times_a_target == 1).all()
    windows = Windows(stream, 31, layout)
    drawn = [windows[i] for i in range(len(windows))]
    assert sum(int(window["target_bytes"].sum()) for window in drawn) == sum(len(d.text) for d in documents)
    assert sum(int(((w["targets"] == END) & (w["loss_weight"] > 0)).sum()) for w in drawn) == len(documents)


def test_documents_that_fit_are_never_cut() -> None:
    _, stream = stream_of(random.Random(2).choices(range(1, 31), k=200))
    layout = first_fit(stream, 31)
    windows = Windows(stream, 31, layout)
    for index in range(len(windows)):
        window = windows[index]
        last = window["segment_ids"].max()
        # Each document ends in its window, so as many ends are targets as there are documents.
        assert ((window["targets"] == END) & (window["loss_weight"] > 0)).sum() == last


def test_little_is_padded_where_documents_are_short() -> None:
    _, stream = stream_of(random.Random(4).choices(range(1, 100), k=2000))
    windows = Windows(stream, 128, first_fit(stream, 128))
    assert 0 <= windows.padding_fraction < 0.04
    padded = sum(float((windows[i]["loss_weight"] == 0).sum()) for i in range(len(windows)))
    assert windows.padding_fraction == pytest.approx(padded / (len(windows) * 128))
