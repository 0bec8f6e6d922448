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
from hybridlm.sharding import constrain

Batch = dict[str, Array]


REPORTED = ("moe_dropped",)
"""Of the blocks' metrics, what says that a loss is not what it could be."""
EvalStep = Callable[[Any, Batch, Array | None], dict[str, Array]]


def make_eval_step(bind: Callable[[Any], LM]) -> EvalStep:
    """`run(params, batch, step)` -> sums over rows: nats and tokens by position [t], and bytes.

    `step` is that of the schedules within the model, None at their end.
    """

    def run(params: Any, batch: Batch, step: Array | None) -> dict[str, Array]:
        lm = bind(params)
        x, _, aux = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]), step=step)
        nll, _ = token_losses(lm.head(), x, batch["targets"])
        weight = batch["loss_weight"]
        return {
            # Whole on every device, of any process, where the mesh cuts time.
            "nats": constrain(jnp.sum(nll * weight, axis=0), None),
            "tokens": constrain(jnp.sum(weight, axis=0), None),
            "bytes": jnp.sum(batch["target_bytes"] * weight),
        } | {name: jnp.mean(aux[name]) for name in REPORTED if name in aux}

    return jax.jit(run)


def evaluate(run: EvalStep, params: Any, batches: Iterable[Batch], step: Array | None = None) -> dict[str, Any]:
    """`loss` in nats per token, `perplexity`, `bits_per_byte`, `tokens`, `bytes`, and `by_position`: the loss in
    buckets of positions within the window that double in size (`(first, end, loss)`); of models with experts
    `moe_dropped`, the mean share of choices that found no place.
    """
    # float64: float32 loses tokens beyond 16 million.
    nats = tokens = num_bytes = np.zeros((), np.float64)
    reported: dict[str, list[float]] = {}
    for batch in batches:
        sums = jax.device_get(run(params, batch, step))
        nats = nats + sums["nats"].astype(np.float64)
        tokens = tokens + sums["tokens"].astype(np.float64)
        num_bytes = num_bytes + np.float64(sums["bytes"])
        for name in REPORTED:
            if name in sums:
                reported.setdefault(name, []).append(float(sums[name]))
    loss = float(nats.sum() / tokens.sum())
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": float(nats.sum() / math.log(2) / num_bytes),
        "tokens": int(tokens.sum()),
        "bytes": int(num_bytes),
        "by_position": position_buckets(nats, tokens),
    } | {name: sum(values) / len(values) for name, values in reported.items()}


def position_buckets(nats: np.ndarray, tokens: np.ndarray) -> list[tuple[int, int, float]]:
    """Mean loss over positions [0, 16), [16, 32), [32, 64), ...; buckets without tokens are left out."""
    buckets, first, end = [], 0, 16
    while first < len(nats):
        count = tokens[first:end].sum()
        if count:
            buckets.append((first, min(end, len(nats)), float(nats[first:end].sum() / count)))
        first, end = end, 2 * end
    return buckets
