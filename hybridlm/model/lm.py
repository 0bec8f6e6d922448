"""The language model: embedding, stack, final norm, head.

Letters: b batch, t time, d model width, v vocabulary.
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import check_values
from hybridlm_kernels.target import target_of
from jaxtyping import Array, Float, Int, Key

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import Pass
from hybridlm.layers import RMSNorm, contract, fan_in_normal, look_up
from hybridlm.losses import Head
from hybridlm.mixers.base import Context, Segments, document_positions
from hybridlm.model.stack import Stack
from hybridlm.sharding import constrain, fold_time, folded_shape, is_time_cut, param, unfold_time

LMState = dict[str, Any]
"""`stack`: the mixers' states; `id`, `position` [b] int32: the document of the last real token, the next position."""


class LM(nnx.Module):
    """tokens -> logits. Parameters are float32; see `config.Model` for the rest."""

    def __init__(self, cfg: config.Model, kernels: config.Kernels, rngs: nnx.Rngs):
        self.cfg, self.context = cfg, make_context(cfg, kernels)
        table = jax.nn.initializers.normal(cfg.width**-0.5)
        self.embedding = param(rngs, (cfg.vocab_size, cfg.width), ("vocab", None), table)
        self.stack = Stack(cfg, self.context, rngs)
        self.shared = nnx.Dict(self._of_ffns("shared", rngs))
        self.norm = RMSNorm(rngs, cfg.width, cfg.norm_eps, offset=cfg.norm_offset)
        self.w_head = (
            None
            if cfg.tied_embedding
            else param(rngs, (cfg.width, cfg.vocab_size), ("embed", "logits"), fan_in_normal(1.0))
        )

    def __call__(
        self, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None, state: LMState | None = None
    ) -> tuple[Float[Array, "b t v"], LMState | None]:
        """Logits in float32, and the state after the last token where one was given (see `init_state`).

        `segment_ids`: 0 is padding, which leaves the state unchanged; the id changes where a document begins. With a
        state, a row continues its document where the first id equals the last one it saw. All ones when absent.
        """
        x, state = self.hidden(tokens, segment_ids, state)
        return self.logits(x), state

    def hidden(
        self, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None, state: LMState | None = None
    ) -> tuple[Float[Array, "b t d"], LMState | None]:
        """What the head reads, where whole logits would be too many, and the state; the rest as in `__call__`."""
        ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        segments = Segments(ids, document_positions(ids))
        if state is not None:
            segments = continue_documents(segments, state)
        x, stack, _ = self.features(tokens, segments, None if state is None else state["stack"])
        return x, None if state is None else {"stack": stack, **_last_token(segments, state)}

    def features(
        self,
        tokens: Int[Array, "b t"],
        segments: Segments,
        stack_state: Any = None,
        step: Int[Array, ""] | None = None,
        key: Key[Array, ""] | None = None,
        taps: Any = None,
    ) -> tuple[Float[Array, "b t d"], Any, dict[str, Any]]:
        """What the head reads, the stack's new state, and the blocks' losses and metrics.

        `step` is that of the schedules within the model, which are at their end where it is absent; `key` is of the
        noise of training, and absent elsewhere. Aux values are vectors over the layers that report them. With `taps`
        (see `taps`) tables are not differentiated, and `aux["recorded"]` holds what their gradients are made from.
        """
        if stack_state is None:
            tokens, *cut = (constrain(x, "sequences", "time") for x in (tokens, *segments))
            segments = Segments(*cut)
        tokens = fold_time(tokens)
        with jax.named_scope("embedding"):
            x = look_up(self.embedding[...], tokens, self.context.dtype)
            if self.cfg.scale_embedding:
                x = x * jnp.asarray(self.cfg.embedding_scale or self.cfg.width**0.5, x.dtype)
        given = Pass(tokens, step, key, dict(self.shared), taps=taps)
        carry = self._of_ffns("init_carry", *tokens.shape)
        with check_values() if self.context.kernels.check_values else contextlib.nullcontext():
            x, stack_state, _, aux = self.stack(x, segments, stack_state, carry, given)
        return unfold_time(self.norm(x)), stack_state, aux

    def _of_ffns(self, what: str, *args: Any) -> dict[str, Any]:
        """What the classes of the model's FFNs make for all layers together (see `hybridlm.ffns.base.FFN`)."""
        made: dict[str, Any] = {}
        for cfg in dict.fromkeys(block.ffn for block in self.cfg.blocks() if block.ffn is not None):
            if make := getattr(FFNS.module_of(cfg), what, None):
                made |= make(cfg, self.context, *args)
        return made

    def head(self) -> Head:
        """For `token_losses`, which never holds all logits."""
        cap = self.cfg.logit_soft_cap
        if self.w_head is None:
            return Head(self.embedding[...], tied=True, soft_cap=cap)
        return Head(self.w_head[...], tied=False, soft_cap=cap)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Float32 logits of features, soft-capped when the config says so."""
        tokens = ("sequences", "time") if is_time_cut(x) else ("batch", None)
        if self.w_head is None:
            # The rows are sharded over fsdp as well, which is the batch's: bring them to the head's layout first.
            table = constrain(self.embedding[...].astype(x.dtype), "logits", None)
            y = contract("btd,vd->btv", x, table, *tokens, "logits", dtype=jnp.float32)
        else:
            y = contract("btd,dv->btv", x, self.w_head[...], *tokens, "logits", dtype=jnp.float32)
        cap = self.cfg.logit_soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)

    def taps(self, batch: int, length: int) -> Any:
        """Zeros that are added to what tables answer, for each layer; for `features`."""
        return self.stack.taps(*folded_shape(batch, length))

    def init_state(self, batch: int, length: int) -> LMState:
        """The state before the first of up to `length` tokens (full attention keeps them all; others do not grow)."""
        zeros = constrain(jnp.zeros((batch,), jnp.int32), "sequences")
        return {"stack": self.stack.init_state(batch, length), "id": zeros, "position": zeros}


def make_context(cfg: config.Model, kernels: config.Kernels) -> Context:
    """`dtype="auto"` is bfloat16, on CPU float32."""
    auto = "float32" if target_of().platform == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if cfg.dtype == "auto" else cfg.dtype)
    ffns = tuple(block.ffn for block in cfg.blocks())
    return Context(cfg.width, cfg.num_layers, cfg.norm_eps, dtype, kernels, ffns, cfg.norm_offset)


def continue_documents(segments: Segments, state: LMState) -> Segments:
    """Positions that go on from the state in each row's first document, where it is the state's last one."""
    ids, positions = segments
    first = jnp.argmax(ids != 0, axis=1, keepdims=True)
    first_id = jnp.take_along_axis(ids, first, axis=1)
    time = jnp.arange(ids.shape[1])
    in_first = (time >= first) & (time - positions <= first) & (ids == first_id)
    goes_on = in_first & (first_id == state["id"][:, None])
    return Segments(ids, positions + jnp.where(goes_on, state["position"][:, None], 0))


def _last_token(segments: Segments, state: LMState) -> dict[str, Array]:
    ids, positions = segments
    time = jnp.arange(ids.shape[1])
    last = jnp.argmax(jnp.where(ids != 0, time, -1), axis=1, keepdims=True)
    any_real = jnp.any(ids != 0, axis=1)
    last_id = jnp.take_along_axis(ids, last, axis=1)[:, 0]
    position = jnp.take_along_axis(positions, last, axis=1)[:, 0] + 1
    return {
        "id": jnp.where(any_real, last_id, state["id"]),
        "position": jnp.where(any_real, position, state["position"]),
    }
