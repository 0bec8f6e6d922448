"""One training step, jitted and donated; everything it decides stays on the device.

Letters: b batch, t time, m microbatches, w steps of a ring.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from hybridlm import config
from hybridlm.finetune.selection import rejoined, trained_part
from hybridlm.layers import gradient_dtype
from hybridlm.losses import Head, token_losses
from hybridlm.mixers.base import Segments
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.optim import derivatives
from hybridlm.train.distill import Distillation
from hybridlm.train.tables import (
    Asked,
    TableStates,
    all_finite,
    are_tables_trained,
    init_tables,
    update_tables,
    with_tables,
    without_tables,
)

Batch = dict[str, Array]
"""`tokens`, `targets`, `segment_ids`, `positions`, `target_bytes` [b, t] int32 and `loss_weight` [b, t] float32."""
Metrics = dict[str, Array]

EVERYTHING = config.Finetune()
"""Trains all parameters."""
SPIKE_WINDOW = 128
"""Accepted steps that a spike is told from."""
SPIKE_MINIMUM = 64
"""So many of them have to be there: of few the standard deviation says little."""


class Recent(NamedTuple):
    """Loss and gradient norm of the last accepted steps, in rings."""

    loss: Float[Array, " w"]
    grad_norm: Float[Array, " w"]
    accepted: Int[Array, ""]
    """Steps accepted so far."""


class TrainState(NamedTuple):
    """Everything that a checkpoint holds of the training."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    nonfinite_in_a_row: Int[Array, ""]
    nonfinite_total: Int[Array, ""]
    table_states: TableStates
    recent: Recent | None = None
    """None in a state that is not trained on."""


def init_state(
    init: Callable[[Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
    tables: config.TableOptimizer | None = None,
    selection: config.Finetune = EVERYTHING,
) -> TrainState:
    """The state before the first step; call it under jit, so that parameters are born sharded."""
    return first_state(init(jax.random.key(seed)), optimizer, tables, selection)


def first_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    tables: config.TableOptimizer | None = None,
    selection: config.Finetune = EVERYTHING,
) -> TrainState:
    """The state before the first step from `params`; likewise. `tables` is the rule for those of memory layers.

    Of parameters that `selection` does not train the optimizer has nothing.
    """
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(trained_part(selection, without_tables(params))),
        nonfinite_in_a_row=zero,
        nonfinite_total=zero,
        table_states=init_tables(tables, params) if are_tables_trained(selection, params) else {},
        recent=Recent(jnp.zeros(SPIKE_WINDOW, jnp.float32), jnp.zeros(SPIKE_WINDOW, jnp.float32), zero),
    )


def spikes(recent: Recent, loss: Float[Array, ""], grad_norm: Float[Array, ""], sigma: float) -> Bool[Array, ""]:
    """Whether loss or gradient norm is above mean + sigma * (standard deviation) of the recent accepted steps."""
    count = jnp.minimum(recent.accepted, SPIKE_WINDOW)
    known = jnp.arange(SPIKE_WINDOW) < count

    def above(value: Float[Array, ""], ring: Float[Array, " w"]) -> Bool[Array, ""]:
        mean = jnp.sum(ring) / jnp.maximum(count, 1)  # the ring is 0 where nothing was written yet
        variance = jnp.sum(jnp.where(known, jnp.square(ring - mean), 0.0)) / jnp.maximum(count, 1)
        return value > mean + sigma * jnp.sqrt(variance)

    high = above(loss, recent.loss) | above(grad_norm, recent.grad_norm)
    return (recent.accepted >= SPIKE_MINIMUM) & high


def remembered(
    recent: Recent, loss: Float[Array, ""], grad_norm: Float[Array, ""], accepted: Bool[Array, ""]
) -> Recent:
    """`recent` with this step in it, if it was accepted."""
    here = (jnp.arange(SPIKE_WINDOW) == recent.accepted % SPIKE_WINDOW) & accepted
    return Recent(
        loss=jnp.where(here, loss, recent.loss),
        grad_norm=jnp.where(here, grad_norm, recent.grad_norm),
        accepted=recent.accepted + accepted,
    )


def batch_sums(
    lm: LM,
    batch: Batch,
    step: Int[Array, ""],
    key: Key[Array, ""],
    taps: Any = None,
    more: Callable[[Head, Float[Array, "b t d"]], dict[str, Float[Array, ""]]] | None = None,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Any]]:
    """Sums over the real tokens of a batch (nats, squared log Z, tokens, bytes), and the blocks' aux values.

    `more` makes further sums of the head and what it reads.
    """
    segments = Segments(batch["segment_ids"], batch["positions"])
    x, _, aux = lm.features(batch["tokens"], segments, step=step, key=key, taps=taps)
    with jax.named_scope("head"):
        nll, log_z = token_losses(lm.head(), x, batch["targets"])
    weight = batch["loss_weight"]
    sums = {
        "nats": jnp.sum(nll * weight),
        "squared_log_z": jnp.sum(jnp.square(log_z) * weight),
        "tokens": jnp.sum(weight),
        "bytes": jnp.sum(batch["target_bytes"] * weight),
    }
    return sums if more is None else sums | more(lm.head(), x), aux


def make_train_step(
    bind: Callable[[Params], LM],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    train: config.Train,
    tables: config.TableOptimizer | None = None,
    distillation: Distillation | None = None,
    selection: config.Finetune = EVERYTHING,
) -> jax.stages.Wrapped:
    """`step(state, batch) -> (state, metrics)`, with a `distillation` `step(state, batch, teacher)`, of which the
    parameters stay as they are. The state is donated.

    Gradients of the microbatches are weighted by their tokens, so that accumulation equals one large batch. A step
    whose loss or gradient is not finite, or with `train.spike_sigma` far above what it was, changes nothing but the
    step counter and the counts of such steps. Nor does a step change parameters that `selection` does not train.
    """

    def differentiated(params: Params) -> Params:
        return trained_part(selection, without_tables(params))

    def learned(sums: dict[str, Any]) -> Array:
        """Nats over the tokens of a batch."""
        return sums["nats"] if distillation is None else distillation.objective(sums)

    def objective(
        params: Params, taps: Any, all_params: Params, batch: Batch, step: Array, key: Array, teacher: Any
    ) -> tuple[Array, tuple[dict[str, Any], Any]]:
        lm = bind(rejoined(params, all_params))
        more = None if distillation is None else partial(distillation.sums, teacher, batch)
        with gradient_dtype(None if train.gradient_dtype == "auto" else train.gradient_dtype):
            sums, aux = batch_sums(lm, batch, step, key, taps, more)
        recorded = aux.pop("recorded", {})
        total = learned(sums)
        if distillation is None or train.z_loss:  # else the backward pass of the next-token loss may be left out
            total = total + train.z_loss * sums["squared_log_z"]
        for name, value in aux.items():
            if name.endswith("_loss"):
                total = total + jnp.sum(value) * sums["tokens"]
        # Aux values are carried as token-weighted sums too, so that parts of a batch simply add up.
        return total, (sums | {f"aux/{name}": value * sums["tokens"] for name, value in aux.items()}, recorded)

    def gradient_sums(
        params: Params, batch: Batch, step: Array, key: Array, teacher: Any
    ) -> tuple[tuple[Params, dict[str, Any]], tuple[Any, Any]]:
        taps = bind(params).taps(*batch["tokens"].shape) if are_tables_trained(selection, params) else None
        differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (grads, answers), (sums, recorded) = differentiate(
            differentiated(params), taps, params, batch, step, key, teacher
        )
        return (grads, sums), (recorded, answers)

    def accumulate(params: Params, batch: Batch, step: Array, teacher: Any) -> tuple[Params, dict[str, Any], Asked]:
        m = train.num_microbatches
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        if m == 1:
            (grads, sums), asked = gradient_sums(params, batch, step, key, teacher)
            return grads, sums, Asked(*asked, leading_axes=0)
        # Rows i, i + m, ... make microbatch i: every device keeps its own rows.
        parts = {name: jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0) for name, x in batch.items()}
        first = {name: x[0] for name, x in parts.items()}
        (_, sums), _ = jax.eval_shape(gradient_sums, params, first, step, key, teacher)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, Any]:
            batch, key = part
            added, asked = gradient_sums(params, batch, step, key, teacher)
            return jax.tree.map(jnp.add, total, added), asked

        start = jax.tree.map(jnp.zeros_like, differentiated(params)), zeros
        (grads, sums), asked = jax.lax.scan(add, start, (parts, jax.random.split(key, m)))
        return grads, sums, Asked(*asked, leading_axes=1)

    def step(state: TrainState, batch: Batch, teacher: Params | None = None) -> tuple[TrainState, Metrics]:
        if distillation is not None:
            batch = distillation.batch(bind(state.params), batch, state.step)
        grads, sums, asked = accumulate(state.params, batch, state.step, teacher)
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        loss, grad_norm = learned(sums) / tokens, optax.tree.norm(derivatives(grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(asked)
        assert state.recent is not None
        accepted = finite
        if train.spike_sigma is not None:
            accepted = finite & ~spikes(state.recent, loss, grad_norm, train.spike_sigma)
        lr = schedule(state.step - state.nonfinite_total)  # rejected steps do not advance it
        dense = differentiated(state.params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, dense)
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(accepted, new, old),
                (optax.apply_updates(dense, updates), opt_state),
                (dense, state.opt_state),
            )
            new_tables, table_states, used = update_tables(
                tables,
                bind(state.params),
                state.table_states,
                asked,
                train=train,
                lr=lr,
                step=state.step - state.nonfinite_total,
                tokens=tokens,
                finite=accepted,
            )
        bad = jnp.where(accepted, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=with_tables(rejoined(params, state.params), new_tables),
            opt_state=opt_state,
            nonfinite_in_a_row=jnp.where(accepted, 0, state.nonfinite_in_a_row + 1),
            nonfinite_total=state.nonfinite_total + bad,
            table_states=table_states,
            recent=remembered(state.recent, loss, grad_norm, accepted),
        )
        metrics = {
            "loss": loss,
            "bits_per_byte": sums["nats"] / jnp.maximum(sums["bytes"], 1.0) / jnp.log(2.0),
            "grad_norm": grad_norm,
            "lr": lr,
            "batch_tokens": sums["tokens"],
            "nonfinite_in_a_row": new_state.nonfinite_in_a_row,
            "nonfinite_total": new_state.nonfinite_total,
        }
        if distillation is not None:
            metrics |= distillation.metrics(sums, tokens)
        by_layer = {name.removeprefix("aux/"): x / tokens for name, x in sums.items() if name.startswith("aux/")}
        for name, value in (by_layer | used).items():
            metrics |= {f"aux/{name}": jnp.mean(value), f"layers/{name}": value}
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)
