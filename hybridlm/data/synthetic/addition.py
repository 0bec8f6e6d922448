"""Sums of numbers, digit by digit (Lee et al., 2023, arXiv:2307.03381). Letters: n digits."""

import numpy as np
from jaxtyping import Int

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_at

PLUS, EQUALS = 10, 11


def addition(task: config.Addition, length: int, rng: np.random.Generator) -> Example:
    """`a+b=c` with numbers of `length` digits, zeros in front included, and a sum of one more.

    Numbers have their first digit first. The sum is what is to be predicted, from = on.
    """
    a, b = rng.integers(0, 10, (2, length))
    total = sum_of(a, b)  # n + 1, last digit first
    written = total if task.order == "reverse" else total[::-1]
    text = np.concatenate([a, [PLUS], b, [EQUALS], written])
    return answered_at(text[:-1], np.arange(2 * length + 1, len(text) - 1), written)


def sum_of(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n+1"]:
    """Digits of a + b, the last first; those of a and b have their first digit first."""
    digits, carry = [], 0
    for x, y in zip(a[::-1].tolist(), b[::-1].tolist(), strict=True):
        carry, digit = divmod(x + y + carry, 10)
        digits.append(digit)
    return np.array([*digits, carry])
