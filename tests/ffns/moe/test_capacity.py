"""One-hot dispatch against a loop that fills queues. Letters: g groups, s tokens of a group, k choices, x experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.ffns.moe.capacity import one_hot_dispatch
from hybridlm.ffns.moe.routing import Routing

G, S, X = 3, 14, 5


def draw(rng: np.random.Generator, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct experts for each token, some of them none."""
    experts = np.argsort(rng.uniform(size=(G * S, X)), axis=1)[:, :k].astype(np.int32)
    experts[rng.uniform(size=experts.shape) < 0.2] = X
    return experts, rng.uniform(size=experts.shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1, 2, 4, S])
def test_first_choices_come_first_and_the_rest_is_dropped(k: int, capacity: int, rng: np.random.Generator) -> None:
    experts, weights = draw(rng, k)
    taken, weighted, dropped = one_hot_dispatch(Routing(jnp.asarray(experts), jnp.asarray(weights)), X, S, capacity)
    want, want_weighted, want_dropped = np.zeros((G, S, X, capacity)), np.zeros((G, S, X, capacity)), 0
    for g in range(G):
        queue = [0] * X
        for j in range(k):
            for s in range(S):
                expert = experts[g * S + s, j]
                if expert == X:
                    continue
                if queue[expert] < capacity:
                    want[g, s, expert, queue[expert]] = 1
                    want_weighted[g, s, expert, queue[expert]] = weights[g * S + s, j]
                    queue[expert] += 1
                else:
                    want_dropped += 1
    assert want_dropped or capacity > 2
    np.testing.assert_array_equal(taken, want)
    np.testing.assert_array_equal(weighted, want_weighted.astype(np.float32))
    assert int(dropped) == want_dropped
