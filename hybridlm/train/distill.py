"""What a step learns from a teacher: divergences from it, on text or on what the student itself goes on with.

Letters: b batch, t time, p prompt, d model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.divergences import Divergence, token_divergences
from hybridlm.generate import Sampling, continuations
from hybridlm.losses import Head
from hybridlm.mixers.base import Segments
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.sharding import constrain

Batch = dict[str, Array]
SAMPLING = Sampling(temperature=1.0)
OF_BATCHES = 0xD157
"""Folded into the key of a step: whether its batch is sampled, and its draws, share no key with the model's noise."""


@dataclass(frozen=True)
class Distillation:
    """The objective of `config.Distill` (see there). What a step draws depends on `seed` and the step alone."""

    cfg: config.Distill
    bind_teacher: Callable[[Params], LM]
    num_ids: int
    """Of the tokenizer: no other ones are drawn."""
    end_id: int
    seed: int

    def batch(self, student: LM, batch: Batch, step: Int[Array, ""]) -> Batch:
        """`batch`, or with probability `on_policy` its prompts with the student's continuations.

        It has a further field, `sampled` [b, t] float32, which is 1 where losses are on drawn tokens.
        """
        batch = batch | {"sampled": jnp.zeros_like(batch["loss_weight"])}
        if not self.cfg.on_policy:
            return batch
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), step), OF_BATCHES)
        return jax.lax.cond(
            jax.random.uniform(key) < self.cfg.on_policy,
            lambda: self._sampled(student, batch, key),
            lambda: batch,
        )

    def _sampled(self, student: LM, batch: Batch, key: Array) -> Batch:
        p, (b, t) = self.cfg.prompt_length, batch["tokens"].shape
        keys = jax.random.key_data(row_keys(key, b))
        prompt, ids = batch["tokens"][:, :p], batch["segment_ids"][:, :p]
        drawn = continuations(student, prompt, ids, keys, t - p + 1, self.num_ids, SAMPLING)  # b t-p+1
        goes_on = (ids[:, -1:] != 0) & before_the_end(drawn, self.end_id)
        following = jnp.arange(1, t - p + 1)[None]
        inputs = goes_on[:, 1:]  # the last token that is drawn is a target alone

        def joined(of_prompt: Array, of_drawn: Array) -> Array:
            parts = [constrain(part, "sequences", None) for part in (of_prompt, of_drawn)]
            return constrain(jnp.concatenate(parts, axis=1), "sequences", "time")

        weight = joined(jnp.zeros((b, p - 1), jnp.float32), goes_on.astype(jnp.float32))
        return {
            "tokens": joined(prompt, jnp.where(inputs, drawn[:, :-1], 0)),
            "targets": joined(batch["targets"][:, : p - 1], jnp.where(goes_on, drawn, 0)),
            "segment_ids": joined(ids, jnp.where(inputs, ids[:, -1:], 0)),
            "positions": joined(
                batch["positions"][:, :p], jnp.where(inputs, batch["positions"][:, p - 1 : p] + following, 0)
            ),
            "target_bytes": jnp.zeros_like(batch["target_bytes"]),
            "loss_weight": weight,
            "sampled": weight,
        }

    def sums(self, teacher: Params, batch: Batch, head: Head, x: Float[Array, "b t d"]) -> dict[str, Float[Array, ""]]:
        """Over the tokens of a batch: `divergence` in nats, and `sampled` tokens. `x` is what the student's head reads.

        Nothing is differentiated in the teacher's parameters.
        """
        lm = self.bind_teacher(jax.lax.stop_gradient(teacher))
        z, _, _ = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        divergence = Divergence(self.cfg.loss, self.cfg.beta, self.cfg.temperature)
        with jax.named_scope("head"):
            values = token_divergences(divergence, head, x, lm.head(), z)
        return {"divergence": jnp.sum(values * batch["loss_weight"]), "sampled": jnp.sum(batch["sampled"])}

    def objective(self, sums: dict[str, Any]) -> Float[Array, ""]:
        """Nats that are learned, summed over tokens."""
        soft = (1.0 - self.cfg.hard_weight) * self.cfg.temperature**2 * sums["divergence"]
        if not self.cfg.hard_weight:
            return soft
        return soft + self.cfg.hard_weight * jnp.where(sums["sampled"] > 0, 0.0, sums["nats"])

    def metrics(self, sums: dict[str, Any], tokens: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
        """Of a step: `divergence` and `hard_loss` in nats per token, whether the batch was `sampled`.

        Of the student's own tokens it is not known how many bytes they stand for.
        """
        sampled = sums["sampled"] > 0
        bits_per_byte = sums["nats"] / jnp.maximum(sums["bytes"], 1.0) / jnp.log(2.0)
        return {
            "divergence": sums["divergence"] / tokens,
            "hard_loss": sums["nats"] / tokens,
            "sampled": sampled.astype(jnp.float32),
            "bits_per_byte": jnp.where(sampled, jnp.nan, bits_per_byte),
        }


def row_keys(key: Array, num_rows: int) -> Array:
    """A key for each row of a batch."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(num_rows))


def before_the_end(drawn: Int[Array, "b t"], end_id: int) -> Bool[Array, "b t"]:
    """Whether a token is the first `end_id` of its row, or comes before it."""
    ends = (drawn == end_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends == 0
