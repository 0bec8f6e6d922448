"""Loss, perplexity and bits per byte on held-out text."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hybridlm.losses import token_losses
from hybridlm.mixers.base import Segments
from hybridlm.model.lm import LM

Batch = dict[str, Array]


def make_eval_step(bind: Callable[[Any], LM]) -> Callable[[Any, Batch], dict[str, Array]]:
    """`step(params, batch)` -> sums over rows: nats and tokens by position [t], and bytes."""

    def step(params: Any, batch: Batch) -> dict[str, Array]:
        lm = bind(params)
        x, _, _ = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        nll, _ = token_losses(lm.logits, x, batch["targets"], lm.cfg.vocab_size)
        weight = batch["loss_weight"]
        return {
            "nats": jnp.sum(nll * weight, axis=0),
            "tokens": jnp.sum(weight, axis=0),
            "bytes": jnp.sum(batch["target_bytes"] * weight),
        }

    return jax.jit(step)


def evaluate(step: Callable[[Any, Batch], dict[str, Array]], params: Any, batches: Iterable[Batch]) -> dict[str, Any]:
    """`loss` in nats per token, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and `by_position`: the loss in
    buckets of positions within the window that double in size (`(first, end, loss)`).
    """
    # float64: float32 loses tokens beyond 16 million.
    nats = tokens = num_bytes = np.zeros((), np.float64)
    for batch in batches:
        sums = jax.device_get(step(params, batch))
        nats = nats + sums["nats"].astype(np.float64)
        tokens = tokens + sums["tokens"].astype(np.float64)
        num_bytes = num_bytes + np.float64(sums["bytes"])
    loss = float(nats.sum() / tokens.sum())
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes),
        "tokens": int(tokens.sum()),
        "bytes": int(num_bytes),
        "by_position": position_buckets(nats, tokens),
    }


def position_buckets(nats: np.ndarray, tokens: np.ndarray) -> list[tuple[int, int, float]]:
    """Mean loss over positions [0, 16), [16, 32), [32, 64), ...; buckets without tokens are left out."""
    buckets, first, end = [], 0, 16
    while first < len(nats):
        count = tokens[first:end].sum()
        if count:
            buckets.append((first, min(end, len(nats)), float(nats[first:end].sum() / count)))
        first, end = end, 2 * end
    return buckets
