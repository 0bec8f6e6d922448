"""How documents are cut into the windows that a model sees: packed, separate or sliding.

A document of n targets is n + 1 tokens, the first of which only is an input. Lengths are numbers of targets.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from hybridlm.config_check import ConfigError

Mode = Literal["packed", "sliding", "separate", "carried"]
MODES: tuple[Mode, ...] = ("packed", "sliding", "separate", "carried")


class Piece(NamedTuple):
    """Inputs `begin` to `end` of a document, in one window."""

    document: int
    begin: int
    end: int
    counted: int
    """The first input whose target counts; those of the inputs before it are counted in another window."""


Window = list[Piece]
"""Pieces side by side, which do not see each other."""


def packed(lengths: Sequence[int], size: int) -> Iterator[Window]:
    """Documents one after the other, cut every `size` inputs."""
    window: Window = []
    room = size
    for document, length in enumerate(lengths):
        begin = 0
        while begin < length:
            end = min(begin + room, length)
            window.append(Piece(document, begin, end, begin))
            room -= end - begin
            begin = end
            if not room:
                yield window
                window, room = [], size
    if window:
        yield window


def separate(lengths: Sequence[int], size: int) -> Iterator[Window]:
    """Each document from its own beginning, cut every `size` inputs."""
    for document, length in enumerate(lengths):
        for begin in range(0, length, size):
            yield [Piece(document, begin, min(begin + size, length), begin)]


def rolling(lengths: Sequence[int], size: int) -> Iterator[Window]:
    """Like `separate`, but the last window of a document begins earlier, so that it is as long as the others
    (`loglikelihood_rolling` of lm-evaluation-harness)."""
    for document, length in enumerate(lengths):
        for begin in range(0, length, size):
            end = min(begin + size, length)
            yield [Piece(document, max(0, end - size), end, begin)]


def sliding(lengths: Sequence[int], size: int, stride: int) -> Iterator[Window]:
    """Windows of `size` tokens that begin every `stride`, of which those count that no window before it held.

    This is the recipe of Hugging Face's "Perplexity of fixed-length models": a window of `size` tokens has `size` - 1
    inputs, and all targets of the first count.
    """
    for document, length in enumerate(lengths):
        counted = 0
        for begin in range(0, length, stride):
            end = min(begin + size - 1, length)
            yield [Piece(document, begin, end, counted)]
            counted = end
            if end == length:
                break


def check(mode: Mode, size: int, stride: int | None) -> None:
    """Raise ConfigError where the numbers do not go together."""
    if mode == "sliding":
        if stride is None:
            raise ConfigError("--windows=sliding", f": needs --stride N, below the {size} tokens of a window")
        if not 1 <= stride < size:
            raise ConfigError("--stride", f"={stride}: must be at least 1 and below --context={size}, the window")
    elif stride is not None:
        raise ConfigError("--stride", f"={stride}: is that of --windows=sliding, not of {mode}; leave it out")


def check_long_enough(mode: Mode, size: int, lengths: Sequence[int]) -> None:
    """Raise ConfigError where a mode that is about documents longer than the window would never come to it."""
    longest = max(lengths, default=0)
    if mode in ("sliding", "carried") and longest + 1 <= size:
        raise ConfigError(
            f"--windows={mode}",
            f": no document is longer than the window of {size} tokens, the longest has {longest + 1}; give a smaller "
            "--context, longer text, or --windows=separate",
        )
