"""Sampling: prefill the prompts in chunks, then one token at a time from the recurrent state.

Letters: b batch, t time, v vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt

from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import Tokenizer
from hybridlm.model import Params
from hybridlm.model.compiled import Model
from hybridlm.model.lm import LM, LMState
from hybridlm.sharding import constrain, per_device

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


class Sampler:
    """Continues rows of tokens. What it compiles for a model serves whatever parameters come with a call.

    On a mesh, of which nothing may cut time, rows are spread over the devices of the batch: their number must divide by
    that of these. What a row draws depends on its own key alone, not on the rows beside it or on the mesh.
    """

    def __init__(self, bind: Callable[[Params], LM], num_ids: int, sampling: Sampling):
        """Ids from `num_ids` on are padding of the vocabulary; they are never drawn."""
        self._bind, self._num_ids, self._sampling = bind, num_ids, sampling
        self._init_state = jax.jit(lambda params, *shape: bind(params).init_state(*shape), static_argnums=(1, 2))
        # A state is read once: what took its place lies where it was.
        self._extend = jax.jit(self._extended, donate_argnums=4)
        self._decode = jax.jit(self._decoded, donate_argnums=2)
        self._draw = jax.jit(self._drawn)

    def __call__(
        self, params: Params, rows: Sequence[Int[np.ndarray, " _"]], keys: UInt[np.ndarray, "b _"], num: int
    ) -> Iterator[Int[Array, " b"]]:
        """`num` times the next token of every row. `keys` holds the `jax.random.key_data` of a key for each row.

        Memory per token is constant; only full attention keeps all tokens.
        """
        logits, state = self.prefill(params, rows, length=max(map(len, rows)) + num)
        tokens = self._draw(logits, keys, np.int32(0))
        for index in range(1, num + 1):
            yield tokens
            if index < num:
                tokens, state = self._decode(params, tokens, state, keys, np.int32(index))

    def prefill(
        self, params: Params, rows: Sequence[Int[np.ndarray, " _"]], *, length: int
    ) -> tuple[Float[Array, "b v"], LMState]:
        """Logits after the last token of each row, and a state that can take `length` tokens in all.

        Chunks are filled up to powers of two with padding, which leaves the state alone: few shapes are compiled.
        """
        state = self._init_state(params, len(rows), length)
        logits = None
        for first in range(0, max(map(len, rows)), PREFILL_CHUNK):
            chunks = [row[first : first + PREFILL_CHUNK] for row in rows]
            size = 1 << (max(map(len, chunks)) - 1).bit_length()
            tokens, real = np.zeros((2, len(rows), size), np.int32)
            for i, chunk in enumerate(chunks):
                tokens[i, : len(chunk)], real[i, : len(chunk)] = chunk, 1
            logits, state = self._extend(params, tokens, real, logits, state)
        assert logits is not None
        return logits, state

    def _extended(
        self,
        params: Params,
        tokens: Int[Array, "b t"],
        real: Int[Array, "b t"],
        before: Float[Array, "b v"] | None,
        state: Any,
    ) -> tuple[Float[Array, "b v"], Any]:
        """Logits after the last real token of each row: those of `before` where none has come since."""
        tokens, real = constrain(tokens, "sequences", None), constrain(real, "sequences", None)
        y, state = self._bind(params)(tokens, real, state)
        y = constrain(y, "sequences", None, None)
        last = jnp.sum(real, axis=1, keepdims=True) - 1  # padding comes last
        at_last = jnp.arange(real.shape[1]) == last
        logits = jnp.sum(jnp.where(at_last[..., None], y, 0), axis=1)
        return logits if before is None else jnp.where(last >= 0, logits, before), state

    def _decoded(
        self, params: Params, tokens: Int[Array, " b"], state: Any, keys: UInt[Array, "b _"], index: Int[Array, ""]
    ) -> tuple[Int[Array, " b"], Any]:
        logits, state = self._bind(params)(tokens[:, None], None, state)
        return self._drawn(logits[:, -1], keys, index), state

    def _drawn(self, logits: Float[Array, "b v"], keys: UInt[Array, "b _"], index: Int[Array, ""]) -> Int[Array, " b"]:
        return drawn(logits, keys, index, self._num_ids, self._sampling)


def drawn(
    logits: Float[Array, "b v"], keys: UInt[Array, "b _"], index: Int[Array, ""], num_ids: int, sampling: Sampling
) -> Int[Array, " b"]:
    """The token number `index` of each row, one of the first `num_ids`; `keys` as `Sampler` takes them."""

    def row(logits: Array, key: Array, index: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key), index)
        return sample(logits[None, :num_ids], key, sampling)[0]

    rows = ("sequences", None)
    draw = per_device(jax.vmap(row, in_axes=(0, 0, None)), (rows, rows, ()), ("sequences",))
    return draw(logits, keys, index)


def continuations(
    lm: LM,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    keys: UInt[Array, "b _"],
    num: int,
    num_ids: int,
    sampling: Sampling,
) -> Int[Array, "b num"]:
    """What `Sampler` draws after the last document of each row, within one compiled program. Nothing may cut time.

    Rows that end in padding go on with something that means nothing.
    """
    state = lm.init_state(tokens.shape[0], tokens.shape[1] + num)
    if tokens.shape[1] > 1:
        _, after = lm(tokens[:, :-1], segment_ids[:, :-1], state)  # of the logits nothing is computed: none are read
        state = _laid_out_like(after, state)
    last = segment_ids[:, -1:]

    def one(carry: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], Array]:
        before, state = carry
        logits, after = lm(before[:, None], last, state)
        token = drawn(logits[:, -1], keys, index, num_ids, sampling)
        return (token, _laid_out_like(after, state)), token

    start = constrain(tokens[:, -1], "sequences"), state
    _, rows = jax.lax.scan(one, start, jnp.arange(num, dtype=jnp.int32))
    return constrain(rows.T, "sequences", None)


def _laid_out_like(tree: Any, like: Any) -> Any:
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x, y: jax.sharding.reshard(x, jax.typeof(y).sharding.spec), tree, like)


def generate(
    model: Model, tokenizer: Tokenizer, prompt: bytes, *, max_new_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Token ids as they are drawn, until the end of the document or `max_new_tokens`.

    The prompt is the beginning of a document. Memory per token is constant; only full attention keeps all tokens.
    """
    sampler = Sampler(model.bind, tokenizer.vocab_size, sampling)
    keys = np.asarray(jax.random.key_data(jax.random.key(seed)))[None]
    for tokens in sampler(model.params, [beginning(tokenizer, prompt)], keys, max_new_tokens):
        drawn = int(tokens[0])
        if drawn == tokenizer.end_id:
            return
        yield drawn


def beginning(tokenizer: Tokenizer, text: bytes) -> Int[np.ndarray, " t"]:
    """Tokens of a document that begins with `text`."""
    return np.concatenate([[tokenizer.begin_id], tokenizer.encode(text)]).astype(np.int32)
