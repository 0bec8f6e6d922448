"""`--task passkey` and `--task needle`: a number hidden in a long text, by how long it is and how deep the number lies.

The passkey lies in noise (Mohtashami and Jaggi, 2023, arXiv:2305.16300), the needle in real text (Kamradt, 2023; the
sentence is that of RULER, Hsieh et al., 2024, arXiv:2404.06654).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import text_of
from hybridlm.data.tokenizers import Tokenizer
from hybridlm.evaluation.loglikelihood import Request, log_likelihoods
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.text_losses import texts_of
from hybridlm.evaluation.texts import sentences

NOISE = (
    b"The grass is green. ",
    b"The sky is blue. ",
    b"The sun is yellow. ",
    b"Here we go. ",
    b"There and back again. ",
)
DEFAULT_LENGTHS = (1, 2, 4)
"""Times the length that the run was trained on."""


@dataclass(frozen=True)
class Form:
    """What is hidden and what is asked, with `{key}` for the number."""

    hidden: str
    question: str
    digits: int


PASSKEY = Form(
    "The pass key is {key}. Remember it. {key} is the pass key. ", "What is the pass key? The pass key is", 5
)
NEEDLE = Form(
    "The special magic number for this text is: {key}. ",
    "What is the special magic number for this text? The special magic number for this text is:",
    7,
)


def passkey(scorer: Scorer, options: Options) -> dict[str, Any]:
    """A number in noise."""
    return grid(scorer, options, PASSKEY, NOISE)


def needle(scorer: Scorer, options: Options) -> dict[str, Any]:
    """A number in the text of `--data`, or in the run's held-out text."""
    texts = texts_of(scorer, options)
    haystack = list(sentences([text_of(text.tokens[1:-1], scorer.tokenizer) for text in texts]))
    if not haystack:
        raise ConfigError("--data", ": holds no sentences to hide the needle in")
    return grid(scorer, options, NEEDLE, haystack)


def grid(scorer: Scorer, options: Options, form: Form, filler: Sequence[bytes]) -> dict[str, Any]:
    """`acc`: shares of greedy answers, over all prompts; `cells`: by length and depth, with `bits` per answer.

    Prompts depend on the seed, the length, the depth and the number of the prompt alone.
    """
    lengths = options.length or tuple(times * scorer.train_length for times in DEFAULT_LENGTHS)
    tokenised = [np.asarray(scorer.tokenizer.encode(sentence), np.int32) for sentence in filler]
    cells = []
    for row, length in enumerate(lengths):
        requests = [
            prompt(
                scorer.tokenizer,
                form,
                tokenised,
                length=length,
                depth=depth,
                rng=np.random.default_rng([options.seed, row, column, sample]),
                twice=options.read_twice,
            )
            for column, depth in enumerate(options.depth)
            for sample in range(options.samples)
        ]
        found = iter(log_likelihoods(scorer, requests))
        for depth in options.depth:
            answers = [next(found) for _ in range(options.samples)]
            bits = -sum(answer.log_likelihood for answer in answers) / len(answers) / np.log(2)
            right = sum(answer.greedy for answer in answers) / len(answers)
            cells.append({"length": length, "depth": depth, "acc": right, "bits": float(bits)})
    return {
        "samples": options.samples,
        "acc": float(np.mean([cell["acc"] for cell in cells])),
        "bits": float(np.mean([cell["bits"] for cell in cells])),
        # A number of uniform digits: what a model that finds nothing can reach.
        "chance_bits": float(np.log2(9 * 10 ** (form.digits - 1))),
        "cells": cells,
    }


def prompt(
    tokenizer: Tokenizer,
    form: Form,
    filler: Sequence[Int[np.ndarray, " _"]],
    *,
    length: int,
    depth: float,
    rng: np.random.Generator,
    twice: bool,
) -> Request:
    """A prompt of at most `length` tokens, the answer included, filled up with whole sentences from a random one on.

    Raises ConfigError where `length` has no room for the question.
    """
    key = str(rng.integers(10 ** (form.digits - 1), 10**form.digits))
    hidden, question = (
        np.asarray(tokenizer.encode(text.format(key=key).encode()), np.int32) for text in (form.hidden, form.question)
    )
    answer = np.asarray(tokenizer.encode(f" {key}".encode()), np.int32)
    copies = 2 if twice else 1
    needed = 1 + copies * (len(hidden) + len(question)) + len(answer)
    if length < needed:
        raise ConfigError(
            f"--length={length}",
            f": what is hidden, the question and the answer take {needed} tokens already; give at least as many",
        )
    room = (length - needed) // copies
    straw = _fill(filler, room, int(rng.integers(len(filler))))
    ends = np.cumsum([0, *map(len, straw)])
    place = int(np.argmin(np.abs(ends - depth * ends[-1])))
    body = [*straw[:place], hidden, *straw[place:], question] * copies
    return Request(np.concatenate([[tokenizer.begin_id], *body]).astype(np.int32), answer)


def _fill(filler: Sequence[np.ndarray], room: int, first: int) -> list[np.ndarray]:
    """Sentences in turn while there is room; the last is cut, as a rule."""
    straw = []
    while room > 0:
        straw.append(filler[first % len(filler)][:room])
        room, first = room - len(straw[-1]), first + 1
    return straw


def lines_of(cells: Iterable[dict[str, Any]]) -> list[str]:
    """Accuracy and bits per answer, depths down and lengths across."""
    cells = list(cells)
    lengths, depths = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("length", "depth"))
    by = {(cell["length"], cell["depth"]): cell for cell in cells}
    lines = ["depth \\ length" + "".join(f"{length:>16,}" for length in lengths)]
    for depth in depths:
        values = (by[length, depth] for length in lengths)
        lines.append(f"{depth:14.2f}" + "".join(f"{v['acc']:8.1%} {v['bits']:5.1f} b" for v in values))
    return lines
