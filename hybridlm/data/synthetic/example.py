"""What a task makes: one example. Letters: t time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int


class Example(NamedTuple):
    """Inputs, what is to be predicted at each of them, and where that is an answer, which alone has a loss."""

    tokens: Int[np.ndarray, " t"]
    targets: Int[np.ndarray, " t"]
    """0 where there is no answer."""
    answers: Bool[np.ndarray, " t"]


def answered_at(tokens: Int[np.ndarray, " t"], places: np.ndarray, answers: np.ndarray) -> Example:
    """An example with `answers` at `places`."""
    targets, is_answer = np.zeros_like(tokens), np.zeros(len(tokens), bool)
    targets[places], is_answer[places] = answers, True
    return Example(tokens, targets, is_answer)


def answered_as_asked(tokens: Int[np.ndarray, " t"], targets: Int[np.ndarray, " t"], asked: str) -> Example:
    """An example with an answer at `every` token, or at the `last` alone."""
    places = np.arange(len(tokens)) if asked == "every" else np.array([len(tokens) - 1])
    return answered_at(tokens, places, targets[places])
