"""Word problems of symmetric groups (Merrill et al., 2024, arXiv:2404.08819; Grazzi et al., 2024, arXiv:2411.12537).

Letters: p permutations, d things permuted.
"""

import functools
import itertools

import numpy as np
from jaxtyping import Int

from hybridlm.config_tasks import WordProblem
from hybridlm.data.synthetic.example import Example, answered_as_asked


def word_problem(task: WordProblem, length: int, rng: np.random.Generator) -> Example:
    """Random elements x_1, ..., x_t, answered by y_t = x_t o ... o x_1: x_1 is applied first."""
    inputs, products = inputs_of(task.degree, task.swaps_only), products_of(task.degree)
    tokens = inputs[rng.integers(0, len(inputs), length)]
    targets, product = np.empty_like(tokens), 0  # the identity is the first in the order of a dictionary
    for t, element in enumerate(tokens.tolist()):
        product = targets[t] = products[element, product]
    return answered_as_asked(tokens, targets, "every")


@functools.cache
def elements_of(degree: int) -> Int[np.ndarray, "p d"]:
    """All permutations, in the order of a dictionary."""
    return np.array(list(itertools.permutations(range(degree))))


@functools.cache
def products_of(degree: int) -> Int[np.ndarray, "p p"]:
    """[a, b] is the place of a o b: of b first, then a."""
    elements = elements_of(degree)
    places = {tuple(element): place for place, element in enumerate(elements.tolist())}
    return np.array([[places[tuple(a[b].tolist())] for b in elements] for a in elements])


@functools.cache
def inputs_of(degree: int, swaps_only: bool) -> Int[np.ndarray, " p"]:
    """Places of the permutations that are inputs: all, or those that move at most two things."""
    moved = (elements_of(degree) != np.arange(degree)).sum(axis=1)
    return np.flatnonzero(moved <= (2 if swaps_only else degree))
