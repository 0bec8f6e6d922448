"""How documents are cut, against the plain loops that define it; and every target is counted once."""

from collections.abc import Iterator

import pytest

from hybridlm.config_check import ConfigError
from hybridlm.evaluation import windows
from hybridlm.evaluation.windows import Piece, Window

LENGTHS = [1, 7, 8, 9, 23, 2]


def hugging_face(length: int, size: int, stride: int) -> Iterator[tuple[int, int, list[int]]]:
    """Inputs and counted targets of the recipe of "Perplexity of fixed-length models", for a text of tokens 0 to
    `length`: labels are the window's tokens but those that windows before it held, and the first of them is lost to
    the shift."""
    num_tokens, before = length + 1, 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + size, num_tokens)
        labels = [token if token >= before else None for token in range(begin, end)]
        yield begin, end - 1, [token for token in labels[1:] if token is not None]
        before = end
        if end == num_tokens:
            return


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (8, 1), (8, 7), (5, 4), (30, 2)])
def test_sliding_windows_are_those_of_the_recipe(size: int, stride: int) -> None:
    for length in LENGTHS:
        cut = [piece for [piece] in windows.sliding([length], size, stride)]
        expected = list(hugging_face(length, size, stride))
        assert [(p.begin, p.end, [i + 1 for i in range(p.counted, p.end)]) for p in cut] == expected


@pytest.mark.parametrize("mode", ["packed", "separate", "sliding", "rolling"])
def test_every_target_counts_once(mode: str) -> None:
    cut: list[Window] = {
        "packed": lambda: list(windows.packed(LENGTHS, 8)),
        "separate": lambda: list(windows.separate(LENGTHS, 8)),
        "rolling": lambda: list(windows.rolling(LENGTHS, 8)),
        "sliding": lambda: list(windows.sliding(LENGTHS, 8, 3)),
    }[mode]()
    counted = [(p.document, i) for window in cut for p in window for i in range(p.counted, p.end)]
    assert sorted(counted) == [(d, i) for d, length in enumerate(LENGTHS) for i in range(length)]
    assert all(sum(p.end - p.begin for p in window) <= 8 for window in cut)
    assert all(p.begin <= p.counted < p.end for window in cut for p in window)


def test_packed_windows_are_full_but_the_last() -> None:
    assert list(windows.packed([3, 6], 4)) == [
        [Piece(0, 0, 3, 0), Piece(1, 0, 1, 0)],
        [Piece(1, 1, 5, 1)],
        [Piece(1, 5, 6, 5)],
    ]


def test_the_last_of_rolling_windows_is_as_long_as_the_others() -> None:
    assert [piece for [piece] in windows.rolling([10, 3], 4)] == [
        Piece(0, 0, 4, 0),
        Piece(0, 4, 8, 4),
        Piece(0, 6, 10, 8),
        Piece(1, 0, 3, 0),
    ]


@pytest.mark.parametrize(
    ("mode", "stride", "message"),
    [
        ("sliding", 8, "--stride=8: must be at least 1 and below --context=8"),
        ("sliding", 0, "--stride=0: must be at least 1"),
        ("sliding", None, "--windows=sliding: needs --stride N, below the 8 tokens"),
        ("packed", 3, "--stride=3: is that of --windows=sliding, not of packed"),
    ],
)
def test_strides_that_make_no_sense_are_refused(mode: windows.Mode, stride: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        windows.check(mode, 8, stride)


@pytest.mark.parametrize("mode", ["sliding", "carried"])
def test_text_shorter_than_a_window_is_refused(mode: windows.Mode) -> None:
    windows.check_long_enough(mode, 8, [3, 8])
    with pytest.raises(ConfigError, match="no document is longer than the window of 8 tokens, the longest has 8; give"):
        windows.check_long_enough(mode, 8, [3, 7])
