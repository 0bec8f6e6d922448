"""How tokens reach their experts and come back, inside a `jax.shard_map` or on one device.

Letters: n tokens, k experts per token, x experts, p devices of the `expert` axis, g groups, c capacity, d model width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import config
from hybridlm.ffns.moe.capacity import one_hot_dispatch
from hybridlm.ffns.moe.exchange import all_to_all, num_devices, run_remotely
from hybridlm.ffns.moe.experts import Experts, Weights
from hybridlm.ffns.moe.routing import Routing, Tokens
from hybridlm.ffns.moe.sorted_rows import combine, sort_by_expert, take_rows

Dispatch = Callable[[Any, Tokens, Routing, Experts, Weights, int, float], tuple[Float[Array, "n d"], Int[Array, ""]]]
"""(cfg, tokens, routing, experts, their weights on this device, x, experts per token) -> the tokens' outputs, and how
many of this device's choices were dropped."""


def dropless(
    cfg: config.Dropless,
    tokens: Tokens,
    routing: Routing,
    experts: Experts,
    weights: Weights,
    num_experts: int,
    experts_per_token: float,
) -> tuple[Float[Array, "n d"], Int[Array, ""]]:
    """Rows sorted by expert and grouped matmuls."""
    order = sort_by_expert(routing.experts, num_experts)
    rows, run = take_rows(tokens.x, order), partial(experts.grouped, weights)
    if num_devices() == 1:
        outputs, dropped = run(rows, order.counts), jnp.zeros((), jnp.int32)
    else:
        outputs, dropped = run_remotely(rows, order.counts, routing.experts.shape[1], run, cfg)
    return combine(outputs, routing.weights, order), dropped


def by_capacity(
    cfg: config.Capacity,
    tokens: Tokens,
    routing: Routing,
    experts: Experts,
    weights: Weights,
    num_experts: int,
    experts_per_token: float,
) -> tuple[Float[Array, "n d"], Int[Array, ""]]:
    """One-hot matmuls."""
    group = cfg.group_size or tokens.length
    capacity = math.ceil(cfg.factor * group * experts_per_token / num_experts)
    taken, weighted, dropped = one_hot_dispatch(routing, num_experts, group, capacity)
    x = tokens.x.reshape(-1, group, tokens.x.shape[-1])  # g s d
    rows = jnp.einsum("gsxc,gsd->xgcd", taken.astype(x.dtype), x)
    p = num_devices()
    shape = rows.shape
    if p > 1:
        rows = all_to_all(rows.reshape(p, -1, *shape[1:]), cfg.slices)  # p e g c d
        rows = jnp.moveaxis(rows, 0, 1)  # e p g c d
    outputs = experts.batched(weights, rows.reshape(rows.shape[0], -1, shape[-1])).reshape(rows.shape)
    if p > 1:
        outputs = all_to_all(jnp.moveaxis(outputs, 1, 0), cfg.slices).reshape(shape)
    y = jnp.einsum("gsxc,xgcd->gsd", weighted.astype(x.dtype), outputs, preferred_element_type=jnp.float32)
    return y.astype(x.dtype).reshape(tokens.x.shape), dropped


DISPATCHES: dict[type[config.Dispatch], Dispatch] = {config.Dropless: dropless, config.Capacity: by_capacity}
