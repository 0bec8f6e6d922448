"""Arithmetic modulo a number, without brackets (Deletang et al., 2022, arXiv:2207.02098, "modular arithmetic")."""

import numpy as np

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_at

PLUS, MINUS, TIMES, EQUALS = range(4)
"""Ids, counted from `modulus`."""


def modular_arithmetic(task: config.ModularArithmetic, length: int, rng: np.random.Generator) -> Example:
    """`length` numbers with +, - or * between them, and = behind; products bind more tightly.

    With `answers="every"` each number is answered by the value of the expression that it ends, and = as well.
    """
    m = task.modulus
    numbers, operations = rng.integers(0, m, length), rng.integers(0, 3, length - 1)
    tokens = np.empty(2 * length, np.int64)
    tokens[0::2], tokens[1:-1:2], tokens[-1] = numbers, m + operations, m + EQUALS
    values = values_of_beginnings(numbers.tolist(), operations.tolist(), m)
    if task.answers == "last":
        return answered_at(tokens, np.array([2 * length - 1]), values[-1:])
    places = np.append(np.arange(0, 2 * length, 2), 2 * length - 1)
    return answered_at(tokens, places, np.append(values, values[-1]))


def values_of_beginnings(numbers: list[int], operations: list[int], modulus: int) -> np.ndarray:
    """Values of the expressions that end with each of the numbers.

    A sum of terms that are finished, and the product that may still grow.
    """
    finished, product = 0, numbers[0] % modulus
    values = [product]
    for operation, number in zip(operations, numbers[1:], strict=True):
        if operation == TIMES:
            product = product * number % modulus
        else:
            finished, product = (finished + product) % modulus, (number if operation == PLUS else -number) % modulus
        values.append((finished + product) % modulus)
    return np.array(values)
