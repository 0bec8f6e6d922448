"""Windows against a loop that builds them token by token."""

import random
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data.packing import Windows, tokenize
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer, load_tokenizer

END = ByteTokenizer.end_id


def random_documents(seed: int, lengths: list[int]) -> list[Document]:
    rng = random.Random(seed)
    return [Document(f"d{i}", rng.randbytes(n)) for i, n in enumerate(lengths)]


def windows_by_loop(documents: list[Document], seq_len: int) -> list[list[dict[str, float]]]:
    """Every (input, target) pair of each document in order, cut every `seq_len`, one dict per position."""
    pairs = []
    for number, document in enumerate(documents):
        inputs, targets = [END, *document.text], [*document.text, END]
        pairs += [(number, i, t) for i, t in zip(inputs, targets, strict=True)]
    windows = []
    for begin in range(0, len(pairs), seq_len):
        window, segment, position, previous = [], 0, 0, None
        for number, token, target in pairs[begin : begin + seq_len]:
            if number != previous:
                segment, position, previous = segment + 1, 0, number
            window.append(
                dict(
                    tokens=token,
                    targets=target,
                    segment_ids=segment,
                    positions=position,
                    loss_weight=1.0,
                    target_bytes=int(target != END),
                )
            )
            position += 1
        padding = dict(tokens=END, targets=END, segment_ids=0, positions=0, loss_weight=0.0, target_bytes=0)
        windows.append(window + [padding] * (seq_len - len(window)))
    return windows


@pytest.mark.parametrize("seq_len", [2, 3, 7, 37, 500])
@pytest.mark.parametrize("lengths", [[1], [5, 1, 1, 30, 2], [36, 37, 38, 6, 7], [100]], ids=str)
def test_windows_equal_a_loop_over_tokens(lengths: list[int], seq_len: int) -> None:
    documents = random_documents(seq_len, lengths)
    windows, expected = Windows(tokenize(documents, ByteTokenizer()), seq_len), windows_by_loop(documents, seq_len)
    assert len(windows) == len(expected)
    for window, positions in zip((windows[i] for i in range(len(windows))), expected, strict=True):
        for name, array in window.items():
            assert array.tolist() == [position[name] for position in positions], name


def test_every_byte_of_text_is_a_target_exactly_once_per_epoch() -> None:
    documents = random_documents(0, [13, 1, 64, 200, 3])
    windows = Windows(tokenize(documents, ByteTokenizer()), 17)
    targets = np.concatenate([w["targets"][w["loss_weight"] > 0] for w in (windows[i] for i in range(len(windows)))])
    text = b"".join(document.text for document in documents)
    assert bytes(targets[targets != END].astype(np.uint8)) == text
    assert (targets == END).sum() == len(documents)


def test_arrays_have_the_promised_dtypes() -> None:
    window = Windows(tokenize(random_documents(0, [9]), ByteTokenizer()), 4)[0]
    dtypes = {name: array.dtype for name, array in window.items()}
    assert dtypes.pop("loss_weight") == np.float32
    assert set(dtypes.values()) == {np.dtype(np.int32)} and set(dtypes) == {
        "tokens",
        "targets",
        "segment_ids",
        "positions",
        "target_bytes",
    }


def test_documents_begin_with_the_token_that_is_asked_for_and_end_as_before() -> None:
    stream = tokenize(random_documents(0, [3, 9, 4]), ByteTokenizer())
    for i in range(4):
        usual, asked = Windows(stream, 5)[i], Windows(stream, 5, begin_id=7)[i]
        begins = (usual["tokens"] == END) & (usual["segment_ids"] > 0)
        np.testing.assert_array_equal(asked.pop("tokens"), np.where(begins, 7, usual.pop("tokens")))
        for name, values in usual.items():
            np.testing.assert_array_equal(asked[name], values)


def test_target_bytes_of_subwords_sum_to_the_size_of_the_text(subword_file: Path) -> None:
    texts = ["def add(x):\n  return", "日本語 🙂 and more words", "é"]
    documents = [Document(str(i), text.encode()) for i, text in enumerate(texts)]
    windows = Windows(tokenize(documents, load_tokenizer(str(subword_file))), 5)
    total = sum(int(windows[i]["target_bytes"].sum()) for i in range(len(windows)))
    assert total == sum(len(document.text) for document in documents)


def test_streams_of_small_vocabularies_take_two_bytes_a_token() -> None:
    stream = tokenize(random_documents(0, [50]), ByteTokenizer())
    assert stream.tokens.dtype == np.uint16 and stream.num_bytes.dtype == np.uint8


def test_an_index_past_the_end_is_refused() -> None:
    windows = Windows(tokenize(random_documents(0, [9]), ByteTokenizer()), 4)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]
