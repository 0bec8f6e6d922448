"""Induction heads (Gu and Dao, 2023, arXiv:2312.00752, section 4.1.2)."""

import numpy as np

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_at


def induction(task: config.Induction, length: int, rng: np.random.Generator) -> Example:
    """Random tokens with a special one among them and at the end, where what followed the first is the answer."""
    special = task.vocab_size - 1
    tokens = rng.integers(0, special, length)
    place = int(rng.integers(0, length - 2))
    tokens[[place, length - 1]] = special
    return answered_at(tokens, np.array([length - 1]), tokens[place + 1 : place + 2])
