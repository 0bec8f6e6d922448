"""What a model says of a text, one prediction at a time, in float64."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import hybridlm


class Oracle:
    """A run on one device, asked without states, batches or padding of its own."""

    def __init__(self, run: Path, length: int = 64):
        self._model, self.tokenizer, _ = hybridlm.load(run)
        self._length = length

    def log_probabilities(self, tokens: list[int]) -> np.ndarray:
        """[len(tokens), v]: of what follows each of the tokens of a document."""
        padded, ids = np.full((1, self._length), 0, np.int32), np.zeros((1, self._length), np.int32)
        padded[0, : len(tokens)], ids[0, : len(tokens)] = tokens, 1
        y, _ = self._model(jnp.asarray(padded), jnp.asarray(ids))
        y = np.asarray(y, np.float64)[0, : len(tokens)]
        return y - np.log(np.exp(y).sum(axis=-1, keepdims=True))

    def nats(self, tokens: list[int], targets: list[int]) -> np.ndarray:
        """-log p of each target behind the tokens up to its own."""
        return -self.log_probabilities(tokens)[np.arange(len(targets)), targets]
