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
from hybridlm.train.tables import (
    Asked,
    TableStates,
    all_finite,
    init_tables,
    tables_of,
    update_tables,
    with_tables,
    without_tables,
)

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
    table_states: TableStates


def init_state(
    init: Callable[[Array], Params],
    optimizer: optax.GradientTransformation,
    seed: int,
    tables: config.TableOptimizer | None = None,
) -> TrainState:
    """The state before the first step; call it under jit, so that parameters are born sharded."""
    return first_state(init(jax.random.key(seed)), optimizer, tables)


def first_state(
    params: Params, optimizer: optax.GradientTransformation, tables: config.TableOptimizer | None = None
) -> TrainState:
    """The state before the first step from `params`; likewise. `tables` is the rule for those of memory layers."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(without_tables(params)), zero, zero, init_tables(tables, params))


def batch_sums(
    lm: LM, batch: Batch, step: Int[Array, ""], key: Key[Array, ""], taps: Any = None
) -> tuple[dict[str, Float[Array, ""]], dict[str, Any]]:
    """Sums over the real tokens of a batch (nats, squared log Z, tokens, bytes), and the blocks' aux values."""
    segments = Segments(batch["segment_ids"], batch["positions"])
    x, _, aux = lm.features(batch["tokens"], segments, step=step, key=key, taps=taps)
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
    tables: config.TableOptimizer | None = None,
) -> jax.stages.Wrapped:
    """`step(state, batch) -> (state, metrics)`. The state is donated.

    Gradients of the microbatches are weighted by their tokens, so that accumulation equals one large batch. A step
    whose loss or gradient is not finite changes nothing but the step counter and the counts of such steps.
    """

    def objective(
        params: Params, taps: Any, params_and_tables: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, tuple[dict[str, Any], Any]]:
        lm = bind(with_tables(params, tables_of(params_and_tables)))
        sums, aux = batch_sums(lm, batch, step, key, taps)
        recorded = aux.pop("recorded")
        total = sums["nats"] + train.z_loss * sums["squared_log_z"]
        for name, value in aux.items():
            if name.endswith("_loss"):
                total = total + jnp.sum(value) * sums["tokens"]
        # Aux values are carried as token-weighted sums too, so that parts of a batch simply add up.
        return total, (sums | {f"aux/{name}": value * sums["tokens"] for name, value in aux.items()}, recorded)

    def gradient_sums(
        params: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[tuple[Params, dict[str, Any]], tuple[Any, Any]]:
        taps = bind(params).taps(*batch["tokens"].shape)
        differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
        (grads, answers), (sums, recorded) = differentiate(without_tables(params), taps, params, batch, step, key)
        return (grads, sums), (recorded, answers)

    def accumulate(params: Params, batch: Batch, step: Array) -> tuple[Params, dict[str, Any], Asked]:
        m = train.num_microbatches
        key = jax.random.fold_in(jax.random.key(train.seed), step)
        if m == 1:
            (grads, sums), asked = gradient_sums(params, batch, step, key)
            return grads, sums, Asked(*asked, leading_axes=0)
        # Rows i, i + m, ... make microbatch i: every device keeps its own rows.
        parts = {name: jnp.moveaxis(x.reshape(x.shape[0] // m, m, *x.shape[1:]), 1, 0) for name, x in batch.items()}
        first = {name: x[0] for name, x in parts.items()}
        (_, sums), _ = jax.eval_shape(gradient_sums, params, first, step, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, Any]:
            batch, key = part
            added, asked = gradient_sums(params, batch, step, key)
            return jax.tree.map(jnp.add, total, added), asked

        start = jax.tree.map(jnp.zeros_like, without_tables(params)), zeros
        (grads, sums), asked = jax.lax.scan(add, start, (parts, jax.random.split(key, m)))
        return grads, sums, Asked(*asked, leading_axes=1)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, sums, asked = accumulate(state.params, batch, state.step)
        tokens = jnp.maximum(sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        loss, grad_norm = sums["nats"] / tokens, optax.tree.norm(derivatives(grads))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & all_finite(asked)
        lr = schedule(state.step - state.nonfinite_total)  # rejected steps do not advance it
        dense = without_tables(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, dense)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
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
            finite=finite,
        )
        bad = jnp.where(finite, 0, 1)
        new_state = TrainState(
            step=state.step + 1,
            params=with_tables(params, new_tables),
            opt_state=opt_state,
            nonfinite_in_a_row=jnp.where(finite, 0, state.nonfinite_in_a_row + 1),
            nonfinite_total=state.nonfinite_total + bad,
            table_states=table_states,
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
        by_layer = {name.removeprefix("aux/"): x / tokens for name, x in sums.items() if name.startswith("aux/")}
        for name, value in (by_layer | used).items():
            metrics |= {f"aux/{name}": jnp.mean(value), f"layers/{name}": value}
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)
