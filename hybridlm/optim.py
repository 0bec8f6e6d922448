"""Optimizers and learning rate schedules from config, as optax transformations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybridlm import config
from hybridlm.config_check import ConfigError

RUNNING, RUNNING_RATE = ("running_mean", "running_variance"), 0.1
"""Statistics of batches that are kept for use outside training, and the weight of a step's in them."""


def make_schedule(optimizer: config.Optimizer, steps: int) -> Callable[[Any], Any]:
    """Learning rate of a step, counted from 0. Raises ConfigError where the parts do not fit into `steps`."""
    schedule, peak = optimizer.schedule, optimizer.peak_lr
    match schedule:
        case config.Cosine():
            decay = steps - schedule.warmup_steps
            final = optax.cosine_decay_schedule(peak, max(decay, 1), alpha=schedule.final_fraction)
            stable = 0
        case config.WarmupStableDecay():
            decay = schedule.decay_steps
            final = optax.linear_schedule(peak, peak * schedule.final_fraction, decay)
            stable = steps - schedule.warmup_steps - decay
        case _:
            raise ConfigError("optimizer.schedule", f": no schedule is known for {type(schedule).__name__}")
    if min(decay, stable) < 0 or decay == 0:
        # The decay of a cosine is what the warm-up leaves, so there is always something to lower.
        name = "decay_steps" if isinstance(schedule, config.WarmupStableDecay) and decay >= steps else "warmup_steps"
        raise ConfigError(
            f"optimizer.schedule.{name}",
            f"={getattr(schedule, name)}: warm-up and decay do not fit into train.steps={steps}; "
            f"lower it, as in --optimizer.schedule.{name}={steps // 10}",
        )
    # The first step already moves: (step + 1) / warmup_steps of the peak.
    warmup = optax.linear_schedule(peak / max(schedule.warmup_steps, 1), peak, max(schedule.warmup_steps - 1, 1))
    parts = [warmup, optax.constant_schedule(peak), final]
    boundaries = [schedule.warmup_steps, schedule.warmup_steps + stable]
    return optax.join_schedules(parts, boundaries)


def make_adamw(optimizer: config.AdamW, schedule: Callable[[Any], Any]) -> optax.GradientTransformation:
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decayed,
    )
    if optimizer.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
    balance = optax.chain(optax.scale_by_sign(), optax.scale(-optimizer.router_bias_rate))
    # Masked, so that their state and the norm that gradients are clipped by are of derivatives alone.
    return optax.chain(
        optax.masked(adamw, has_derivative),
        optax.masked(balance, named("balance_bias")),
        optax.masked(optax.scale(-RUNNING_RATE), named(*RUNNING)),
    )


OPTIMIZERS: dict[type[config.Optimizer], Callable[..., optax.GradientTransformation]] = {config.AdamW: make_adamw}


def make_optimizer(
    optimizer: config.Optimizer, steps: int
) -> tuple[optax.GradientTransformation, Callable[[Any], Any]]:
    """The update rule and its learning rate schedule. Raises ConfigError for a class that is not in `OPTIMIZERS`."""
    make = OPTIMIZERS.get(type(optimizer))
    if make is None:
        known = ", ".join(cls.__name__ for cls in OPTIMIZERS)
        raise ConfigError("optimizer", f": {type(optimizer).__name__} is not registered; known are {known}")
    schedule = make_schedule(optimizer, steps)
    return make(optimizer, schedule), schedule


def decayed(params: Any) -> Any:
    """Which parameters weight decay applies to: those named `embedding`, `w` or `w_...`.

    By name, not by rank: biases can have two axes, and in the scanned stack every parameter has one more.
    """

    def is_weight(path: tuple[Any, ...], _: Any) -> bool:
        name = str(path[-1].key)
        return name in ("embedding", "w") or name.startswith("w_")

    return jax.tree_util.tree_map_with_path(is_weight, params)


def derivatives(grads: Any) -> Any:
    """`grads` with zeros for what is none.

    A router's `balance_bias` gets the excess of its experts' loads instead, and running statistics get by how much they
    exceed those of the batch.
    """
    return jax.tree.map(lambda g, keep: g if keep else jnp.zeros_like(g), grads, has_derivative(grads))


def named(*names: str) -> Callable[[Any], Any]:
    """Tells which parameters have one of these names."""
    return partial(jax.tree_util.tree_map_with_path, lambda path, _: str(path[-1].key) in names)


def has_derivative(params: Any) -> Any:
    return jax.tree.map(lambda is_statistic: not is_statistic, named("balance_bias", *RUNNING)(params))
