"""What a run writes when it is given the beginnings of documents, between its steps.

Letters: b batch, t time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt

from hybridlm.config import Config
from hybridlm.data.tokenizers import Tokenizer
from hybridlm.finetune.build import build_trained
from hybridlm.generate import Sampler, Sampling, beginning
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.sharding import axis_size, constrain
from hybridlm.train.checkpoint import abstract_state

SAMPLING = Sampling(temperature=1.0)


class Samples:
    """Continues the prompts of a run on its own devices; all processes take part and have the same text."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh, bind: Callable[[Params], LM], tokenizer: Tokenizer):
        self.prompts, self._num = config.eval.sample_prompts, config.eval.sample_tokens
        self._seed, self._tokenizer = config.train.seed, tokenizer
        self._mesh = decoding_mesh(mesh)
        self._layout = None
        if self.prompts and self._mesh is not mesh:
            init, bind = build_trained(config)
            with jax.set_mesh(self._mesh):
                abstract = abstract_state(lambda: init(jax.random.key(0)), self._mesh)
            self._layout = jax.tree.map(lambda x: x.sharding, abstract)
        self._sampler = Sampler(bind, tokenizer.vocab_size, SAMPLING)
        self._whole = jax.jit(lambda tokens: constrain(jnp.stack(tokens, axis=1), None, None))  # b t

    def __call__(self, params: Params, step: int) -> list[dict[str, Any]]:
        """A record for each prompt: `step`, `prompt` and `text`, what follows until the document ends.

        Draws depend on the run's seed, the step and the place of the prompt among the others.
        """
        if not self.prompts:
            return []
        if self._layout is not None:
            params = jax.device_put(params, self._layout)
        with jax.set_mesh(self._mesh):
            # As many rows as the devices of the batch can share; what is drawn from the copies is dropped.
            parts = axis_size("sequences")
            places = np.arange(-(-len(self.prompts) // parts) * parts) % len(self.prompts)
            rows = [beginning(self._tokenizer, prompt.encode()) for prompt in self.prompts]
            drawn = list(self._sampler(params, [rows[i] for i in places], self._keys(step)[places], self._num))
            tokens = np.asarray(self._whole(drawn))
        return [
            {"step": step, "prompt": prompt, "text": self._tokenizer.decode(self._until_end(row))}
            for prompt, row in zip(self.prompts, tokens, strict=False)
        ]

    def _keys(self, step: int) -> UInt[np.ndarray, "b _"]:
        """A key for each prompt."""
        of_step = jax.random.fold_in(jax.random.key(self._seed), step)
        of_prompts = [jax.random.fold_in(of_step, place) for place in range(len(self.prompts))]
        return np.stack([np.asarray(jax.random.key_data(key)) for key in of_prompts])

    def _until_end(self, row: Int[np.ndarray, " t"]) -> Int[np.ndarray, " _"]:
        ends = np.flatnonzero(row == self._tokenizer.end_id)
        return row[: ends[0]] if len(ends) else row


def decoding_mesh(mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
    """The same devices, in the same order, for steps of one token, which nothing cuts: `context` counts to `fsdp`."""
    sizes = dict(mesh.shape)
    if sizes["context"] == 1:
        return mesh
    sizes |= {"fsdp": sizes["fsdp"] * sizes["context"], "context": 1}
    return jax.sharding.Mesh(mesh.devices.reshape(tuple(sizes.values())), mesh.axis_names, axis_types=mesh.axis_types)
