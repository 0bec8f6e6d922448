"""One training step, jitted and donated; everything it decides stays on the device.

Letters: b batch, t time, m microbatches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from hybridlm import config
from hybridlm.losses import token_losses
from hybridlm.mixers.base import Segments
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.optim import derivatives

Batch = dict[str, Array]
"""`tokens`, `targets`, `segment_ids`, `positions`, `target_bytes` [b, t] int32 and `loss_weight` [b, t] float32."""
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """Everything that a checkpoint holds of the training."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    nonfinite_in_a_row: Int[Array, ""]
    nonfinite_total: Int[Array, ""]


def init_state(init: Callable[[Array], Params], optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """The state before the first step; call it under jit, so that parameters are born sharded."""
    params = init(jax.random.key(seed))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), zero, zero)


def batch_sums(
    lm: LM, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, " layers"]]]:
    """Sums over the real tokens of a batch (nats, squared log Z, tokens, bytes), and the blocks' aux values."""
    segments = Segments(batch["segment_ids"], batch["positions"])
    x, _, aux = lm.features(batch["tokens"], segments, step=step, key=key)
    nll, log_z = token_losses(lm.logits, x, batch["targets"], lm.cfg.vocab_size)
    weight = batch["loss_weight"]
    sums = {
        "nats": jnp.sum(nll * weight),
        "squared_log_z": jnp.sum(jnp.square(log_z) * weight),
        "tokens": jnp.sum(weight),
        "bytes": jnp.sum(batch["target_bytes"] * weight),
    }
    return sums, aux


def make_train_step(
    bind: Callable[[Params], LM],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    train: config.Train,
) -> jax.stages.Wrapped:
    """`step(state, batch) -> (state, metrics)`. The state is donated.

    Gradients of the microbatches are weighted by their tokens, so that accumulation equals one large batch. A step
    whose loss or gradient is not finite changes nothing but the step counter and the counts of such steps.
    """

    def objective(params: Params, batch: Batch, step: Array, key: Array) -> tuple[Array, dict[str, Any]]:
        sums, aux = batch_sums(bind(params), batch, step, key)
        total = sums["nats"] + train.z_loss * sums["squared_log_z"]
        for name, value in aux.items():
            if name.endswith("_loss"):
                total = total + jnp.sum(value) * sums["tokens"]
        # Aux values are carried as token-weighted sums too, so that parts of a batch simply add up.
        return total, sums | {f"aux/{name}": value * sums["tokens"] for name, value in aux.items()}

    gradient_sums = jax.grad(objective, has_aux=True)

    def accumulate(params: Params, batch: Batch, step: Array) -> tuple[Params, dict[str, Any]]:
        m = train.num_microbatches
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        if m == 1:
            return gradient_sums(params, batch, step, key)
        # Rows i, i + m, ... make microbatch i: every device keeps its own rows.
        parts = {name: jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0) for name, x in batch.items()}
        _, sums = jax.eval_shape(gradient_sums, params, {name: x[0] for name, x in parts.items()}, step, key)
        zeros = jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            batch, key = part
            return jax.tree.map(jnp.add, total, gradient_sums(params, batch, step, key)), None

        return jax.lax.scan(add, zeros, (parts, jax.random.split(key, m)))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums = accumulate(state.params, batch, state.step)
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        loss, grad_norm = sums["nats"] / tokens, optax.tree.norm(derivatives(grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        bad = jnp.where(finite, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            nonfinite_in_a_row=jnp.where(finite, 0, state.nonfinite_in_a_row + 1),
            nonfinite_total=state.nonfinite_total + bad,
        )
        metrics = {
            "loss": loss,
            "bits_per_byte": sums["nats"] / jnp.maximum(sums["bytes"], 1.0) / jnp.log(2.0),
            "grad_norm": grad_norm,
            "lr": schedule(state.step - state.nonfinite_total),  # rejected steps do not advance it
            "batch_tokens": sums["tokens"],
            "nonfinite_in_a_row": new_state.nonfinite_in_a_row,
            "nonfinite_total": new_state.nonfinite_total,
        }
        for name, value in sums.items():
            if name.startswith("aux/"):
                by_layer = value / tokens
                metrics |= {name: jnp.mean(by_layer), f"layers/{name.removeprefix('aux/')}": by_layer}
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)
