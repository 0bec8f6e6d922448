"""Parity of bits (Grazzi et al., 2024, arXiv:2411.12537)."""

import numpy as np

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_as_asked


def parity(task: config.Parity, length: int, rng: np.random.Generator) -> Example:
    """Random bits x_1, ..., x_t, answered by x_1 xor ... xor x_t."""
    bits = rng.integers(0, 2, length)
    return answered_as_asked(bits, np.bitwise_xor.accumulate(bits), task.answers)
