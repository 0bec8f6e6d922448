"""Multi-query associative recall (Arora et al., 2023, arXiv:2312.04927, section 4 and appendix). Letters: n pairs."""

import functools

import numpy as np
from jaxtyping import Float

from hybridlm import config
from hybridlm.data.synthetic.example import Example, answered_at


def mqar(task: config.MQAR, length: int, rng: np.random.Generator) -> Example:
    """n pairs k_1 v_1 ... k_n v_n, then every key once more, answered by its value; between them 0.

    Keys are drawn from [1, V / 2) and values from [V / 2, V), each without replacement. Query i stands at 2 n + 2 g_i
    with gaps g_i that differ, p(g) ~ alpha g^(alpha - 1) for g = 1, 2, ... places after the pairs.
    """
    n = task.num_pairs if task.min_pairs is None else int(rng.integers(task.min_pairs, task.num_pairs + 1))
    half = task.vocab_size // 2
    keys = 1 + rng.choice(half - 1, n, replace=False)
    values = half + rng.choice(task.vocab_size - half, n, replace=False)
    num_places = (length - 2 * n) // 2
    gaps = rng.choice(num_places, n, replace=False, p=gap_probabilities(num_places, task.alpha))
    tokens = np.zeros(length, np.int64)
    tokens[0 : 2 * n : 2], tokens[1 : 2 * n : 2] = keys, values
    queries = 2 * n + 2 * gaps
    tokens[queries] = keys
    return answered_at(tokens, queries, values)


@functools.lru_cache(256)
def gap_probabilities(num_places: int, alpha: float) -> Float[np.ndarray, " g"]:
    """Of the gaps 1, 2, ..., num_places."""
    weights = alpha * np.arange(1, num_places + 1) ** (alpha - 1)
    return weights / weights.sum()
