"""Experts of which only the hottest lie on the device (Huang et al., 2023, arXiv:2303.06182).

Letters: x experts, e resident experts, r rows, d model width, f FFN width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from hybridlm.ffns.moe.experts import Experts, Weights

HostWeights = tuple[Shaped[np.ndarray, "d f"], Shaped[np.ndarray, "d f"], Shaped[np.ndarray, "f d"]]
"""W_gate, W_up and W_down of one expert."""


@dataclass(eq=False)
class ExpertStore:
    """The experts in host memory, in the activations' dtype, by layer and number; and what was fetched of them."""

    weights: dict[tuple[int, int], HostWeights]
    num_fetched: int = 0
    bytes_fetched: int = 0

    def fetch(self, layer: Int[Array, ""], expert: Int[Array, ""]) -> HostWeights:
        found = self.weights[int(layer), int(expert)]
        self.num_fetched += 1
        self.bytes_fetched += sum(w.nbytes for w in found)
        return found


class BufferedExperts(Experts):
    """Takes the place of `Experts`, for inference on one device: an expert that is not resident is fetched when a
    token goes to it, one at a time, and forgotten."""

    def __init__(self, resident: Experts, ids: Int[Array, "*l e"], layer: Int[Array, "*l"], store: ExpertStore):
        """`resident` holds the weights of the experts `ids`, which ascend, of layer number `layer`."""
        self.activation, self.impl = resident.activation, resident.impl
        self.w_gate, self.w_up, self.w_down = resident.w_gate, resident.w_up, resident.w_down
        self.ids, self.layer, self.store = nnx.Variable(ids), nnx.Variable(layer), store

    def grouped(self, weights: Weights, rows: Float[Array, "r d"], sizes: Int[Array, " x"]) -> Float[Array, "r d"]:
        ids, ends = self.ids[...], jnp.cumsum(sizes)
        # Rows of residents first, still in the order of their experts, then all others.
        place = jnp.full(sizes.size + 1, ids.size).at[ids].set(jnp.arange(ids.size))
        expert_of = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")  # x beyond the last
        order = jnp.argsort(place[expert_of], stable=True)
        y = super().grouped(weights, rows[order], sizes[ids])
        y = jnp.zeros_like(y).at[order].set(y, unique_indices=True)
        missed = (sizes > 0).at[ids].set(False)
        if ids.size == sizes.size:
            return y
        one = tuple(jax.ShapeDtypeStruct(w.shape[1:], w.dtype) for w in weights)

        def fetch_one(loop: tuple[Array, Array]) -> tuple[Array, Array]:
            missed, y = loop
            expert = jnp.argmax(missed)
            fetched = jax.pure_callback(self.store.fetch, one, self.layer[...], expert)
            w_gate, w_up, w_down = (w[None] for w in fetched)
            start = ends[expert] - sizes[expert]
            own = super(BufferedExperts, self).grouped(
                (w_gate, w_up, w_down), jnp.roll(rows, -start, axis=0), sizes[expert][None]
            )
            return missed.at[expert].set(False), y + jnp.roll(own, start, axis=0)

        return jax.lax.while_loop(lambda loop: jnp.any(loop[0]), fetch_one, (missed, y))[1]
