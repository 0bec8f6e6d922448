"""A run's latest checkpoint on its mesh, and what it thinks of rows of tokens.

Letters: b batch, t time, d model width, v vocabulary, n chunks, c chunk.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.data.tokenizers import Tokenizer, load_tokenizer
from hybridlm.losses import LOGITS_PER_CHUNK
from hybridlm.model import Params, build
from hybridlm.model.lm import LM, LMState
from hybridlm.sharding import RULES, constrain
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.mesh_choice import run_mesh
from hybridlm.train.samples import decoding_mesh


class Rows(NamedTuple):
    """Inputs of a call, int32."""

    tokens: Int[np.ndarray, "b t"]
    targets: Int[np.ndarray, "b t"]
    segment_ids: Int[np.ndarray, "b t"]
    """0 is padding, which changes no state."""

    @classmethod
    def padding(cls, num_rows: int, length: int) -> "Rows":
        return cls(*(np.zeros((num_rows, length), np.int32) for _ in range(3)))


class Scores(NamedTuple):
    """Of every target."""

    nats: Float[Array, "b t"]
    """-log p, float32."""
    greedy: Bool[Array, "b t"]
    """Whether no token of the tokenizer is more likely."""


class Scorer:
    """A model, its parameters and tokenizer, and compiled calls. Rows of a call are spread over the devices."""

    def __init__(
        self, cfg: config.Config, mesh: Mesh, params: Params, tokenizer: Tokenizer, *, step: int, train_length: int
    ):
        """`train_length` is the length of the sequences that the run was trained on, in tokens."""
        self.cfg, self.mesh, self.params, self.tokenizer = cfg, mesh, params, tokenizer
        self.step, self.train_length = step, train_length
        _, self.bind = build(cfg.model, cfg.kernels)
        parts = math.prod(mesh.shape[axis] for axis in RULES["sequences"])
        self.num_rows = -(-cfg.train.batch_size // parts) * parts
        self._init: Any = jax.jit(lambda params, *shape: self.bind(params).init_state(*shape), static_argnums=(1, 2))
        self._alone: Any = jax.jit(lambda params, *rows: self._score(params, *rows, state=None)[0])
        self._after: Any = jax.jit(lambda *args: self._score(*args)[0])
        self._carried: Any = jax.jit(self._score, donate_argnums=4)
        self._advance: Any = jax.jit(self._advanced, donate_argnums=3)

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return self.cfg.data.seq_len

    def init_state(self, length: int) -> LMState:
        """The state of `num_rows` rows before the first of up to `length` tokens."""
        with jax.set_mesh(self.mesh):
            return self._init(self.params, self.num_rows, length)

    def alone(self, rows: Rows) -> Scores:
        """Of rows that have nothing before them."""
        with jax.set_mesh(self.mesh):
            return self._alone(self.params, *rows)

    def after(self, rows: Rows, state: LMState) -> Scores:
        """Of rows behind `state`, which may be used again."""
        with jax.set_mesh(self.mesh):
            return self._after(self.params, *rows, state)

    def carried(self, rows: Rows, state: LMState) -> tuple[Scores, LMState]:
        """Of rows behind `state`, and the state behind them, which takes its room."""
        with jax.set_mesh(self.mesh):
            return self._carried(self.params, *rows, state)

    def advance(self, tokens: Int[np.ndarray, "b t"], segment_ids: Int[np.ndarray, "b t"], state: LMState) -> LMState:
        """The state behind the rows, which takes the room of the one before; no logits."""
        with jax.set_mesh(self.mesh):
            return self._advance(self.params, tokens, segment_ids, state)

    def _advanced(self, params: Params, tokens: Array, ids: Array, state: LMState) -> LMState:
        tokens, ids = (constrain(x, "sequences", None) for x in (tokens, ids))
        _, after = self.bind(params).hidden(tokens, ids, state)
        assert after is not None
        return after

    def _score(
        self, params: Params, tokens: Array, targets: Array, ids: Array, state: LMState | None
    ) -> tuple[Scores, LMState | None]:
        tokens, targets, ids = (constrain(x, "sequences", None) for x in (tokens, targets, ids))
        lm = self.bind(params)
        x, after = lm.hidden(tokens, ids, state)
        return scores_of(lm, x, targets, self.tokenizer.vocab_size), after


def scores_of(lm: LM, x: Float[Array, "b t d"], targets: Int[Array, "b t"], num_ids: int) -> Scores:
    """Logits are computed in chunks of time, and never held whole. Ids from `num_ids` on are never greedy."""
    chunk = max(1, LOGITS_PER_CHUNK // lm.cfg.vocab_size)
    if chunk >= x.shape[1]:
        return Scores(*_of_chunk(lm, x, targets, num_ids))
    t = x.shape[1]

    def cut(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, -t % chunk), *[(0, 0)] * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, chunk, *a.shape[2:]), 1, 0)  # n b c ...

    parts = jax.lax.map(lambda part: _of_chunk(lm, part[0], part[1], num_ids), (cut(x), cut(targets)))
    return Scores(*(jnp.moveaxis(part, 0, 1).reshape(x.shape[0], -1)[:, :t] for part in parts))


def _of_chunk(lm: LM, x: Array, targets: Array, num_ids: int) -> tuple[Array, Array]:
    y = lm.logits(x)
    words = jnp.arange(y.shape[-1])
    # A masked sum and maximum, not a gather or slice: the vocabulary may be cut over devices.
    picked = jnp.sum(jnp.where(words == targets[..., None], y, 0.0), axis=-1)
    best = jnp.max(jnp.where(words < num_ids, y, -jnp.inf), axis=-1)
    return jax.nn.logsumexp(y, axis=-1) - picked, picked >= best


def open_run(cfg: config.Config, run_dir: Path, train_length: int) -> Scorer:
    """The latest checkpoint of a run on the devices of `cfg.sharding.mesh`, whose `context` counts to `fsdp`.

    Raises ConfigError where the directory holds no complete checkpoint.
    """
    mesh = decoding_mesh(run_mesh(cfg))
    init, _ = build(cfg.model, cfg.kernels)
    with jax.set_mesh(mesh), Checkpoints(run_dir / "checkpoints", cfg.model, cfg.checkpoint) as checkpoints:
        params: Any = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        step = checkpoints.latest_step()
    assert step is not None  # restore_params found one
    return Scorer(cfg, mesh, params, load_tokenizer(cfg.data.tokenizer), step=step, train_length=train_length)


def bucket(length: int) -> int:
    """The next length of 16, 24, 32, 48, 64, 96, ...: few shapes are compiled, and no row is more than half padding."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
