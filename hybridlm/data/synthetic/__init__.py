"""Synthetic tasks: which function makes the examples of which config."""

from collections.abc import Callable
from typing import Any

import numpy as np

from hybridlm import config
from hybridlm.data.synthetic.addition import addition
from hybridlm.data.synthetic.copying import copying, selective_copying
from hybridlm.data.synthetic.example import Example
from hybridlm.data.synthetic.induction import induction
from hybridlm.data.synthetic.modular_arithmetic import modular_arithmetic
from hybridlm.data.synthetic.mqar import mqar
from hybridlm.data.synthetic.parity import parity
from hybridlm.data.synthetic.permutations import word_problem

MAKERS: dict[type[config.Task], Callable[[Any, int, np.random.Generator], Example]] = {
    config.MQAR: mqar,
    config.Parity: parity,
    config.ModularArithmetic: modular_arithmetic,
    config.S3: word_problem,
    config.S5: word_problem,
    config.S5Swaps: word_problem,
    config.Addition: addition,
    config.Copying: copying,
    config.SelectiveCopying: selective_copying,
    config.Induction: induction,
}
"""Each takes its config, a length in the task's unit, and random numbers."""


def make_example(task: config.Task, length: int, rng: np.random.Generator) -> Example:
    """An example of `length`, which has `task.num_tokens(length)` tokens."""
    return MAKERS[type(task)](task, length, rng)
