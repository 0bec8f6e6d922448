"""Copying (Jelassi et al., 2024, arXiv:2402.01032) and selective copying (Gu and Dao, 2023, arXiv:2312.00752)."""

import numpy as np

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_at


def copying(task: config.Copying, length: int, rng: np.random.Generator) -> Example:
    """`length` random symbols and a separator, from which on the same symbols are to be predicted."""
    symbols = rng.integers(0, task.num_symbols, length)
    tokens = np.concatenate([symbols, [task.num_symbols], symbols[:-1]])
    return answered_at(tokens, np.arange(length, 2 * length), symbols)


def selective_copying(task: config.SelectiveCopying, length: int, rng: np.random.Generator) -> Example:
    """Random symbols at random places among blanks; then a marker for each, answered by the symbols in their order."""
    n, marker = task.num_copied, task.vocab_size - 1
    symbols = rng.integers(1, marker, n)
    tokens = np.zeros(length, np.int64)
    tokens[np.sort(rng.choice(length - n, n, replace=False))] = symbols
    tokens[length - n :] = marker
    return answered_at(tokens, np.arange(length - n, length), symbols)
