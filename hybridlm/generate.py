"""Sampling: prefill the prompt in chunks, then one token at a time from the recurrent state.

Letters: b batch, t time, v vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import Tokenizer
from hybridlm.model.lm import LMState
from hybridlm.run import Model

PREFILL_CHUNK = 512
"""Prompt tokens per call: bounds memory on long prompts."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; `temperature` 0 takes the most likely one."""

    temperature: float = 1.0
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together hold this probability (Holtzman et al., 2019, arXiv:1904.09751)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError("--temperature", f"={self.temperature}: must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("--top-k", f"={self.top_k}: must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("--top-p", f"={self.top_p}: must be above 0 and at most 1")


def sample(logits: Float[Array, "b v"], key: Key[Array, ""], sampling: Sampling) -> Int[Array, " b"]:
    """One token per row, int32."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token is kept when those before it do not reach top_p yet: the first always is.
        kept = jnp.cumsum(probability, axis=-1) - probability < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def generate(
    model: Model, tokenizer: Tokenizer, prompt: bytes, *, max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Token ids as they are drawn, until the end of the document or `max_new_tokens`.

    The prompt is the beginning of a document. Memory per token is constant; only full attention keeps all tokens.
    """
    # Ids beyond the tokenizer's are padding of the vocabulary; they are never drawn.
    num_ids = tokenizer.vocab_size

    def draw(logits: Float[Array, "b v"], key: Key[Array, ""], index: Int[Array, ""]) -> Int[Array, " b"]:
        return sample(logits[:, :num_ids], jax.random.fold_in(key, index), sampling)

    @jax.jit
    def decode(params, token, state, key, index):
        logits, state = model.bind(params)(token[:, None], None, state)
        return draw(logits[:, -1], key, index), state

    key = jax.random.key(seed)
    ids = np.concatenate([[tokenizer.end_id], tokenizer.encode(prompt)]).astype(np.int32)
    logits, state = prefill(model, ids, length=len(ids) + max_new_tokens)
    token = draw(logits, key, jnp.zeros((), jnp.int32))
    for index in range(1, max_new_tokens + 1):
        drawn = int(token[0])
        if drawn == tokenizer.end_id:
            return
        yield drawn
        if index < max_new_tokens:
            token, state = decode(model.params, token, state, key, jnp.asarray(index, jnp.int32))


def prefill(model: Model, ids: Int[np.ndarray, " t"], *, length: int) -> tuple[Float[Array, "1 v"], LMState]:
    """Logits after the last of `ids`, and a state that can take `length` tokens in all.

    Chunks are filled up to powers of two with padding, which leaves the state alone: few shapes are compiled.
    """
    state = model.init_state(1, length)
    logits = None
    for first in range(0, len(ids), PREFILL_CHUNK):
        chunk = ids[first : first + PREFILL_CHUNK]
        size = 1 << (len(chunk) - 1).bit_length()
        tokens, real = np.zeros((1, size), np.int32), np.zeros((1, size), np.int32)
        tokens[0, : len(chunk)], real[0, : len(chunk)] = chunk, 1
        logits, state = model(jnp.asarray(tokens), jnp.asarray(real), state)
        logits = logits[:, len(chunk) - 1]
    assert logits is not None and state is not None
    return logits, state
