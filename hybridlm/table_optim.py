"""Optimizers of memory tables, which change the rows that a step uses and no others.

Letters: t tokens, k rows per token, n rows of a table, v row width, u rows changed at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from hybridlm_kernels.memory_lookup.row_gradients import apply_row_gradients, squared_row_gradients
from jaxtyping import Array, Float, Int, Key, Shaped, UInt32

from hybridlm import config_tables
from hybridlm.config_check import ConfigError

State = dict[str, Array]
"""What an optimizer keeps of a table: arrays whose first axis is the table's rows."""
Sum = Callable[[Any], Any]
"""The sum over devices of an array, or of a number that each of them has."""


class Rule(NamedTuple):
    """How one optimizer works on rows that are used."""

    init: Callable[[Any, Array], State]
    """(cfg, table) -> state before the first step."""
    direction: Callable[[Any, State, Array, Array | int, Sum], tuple[Array, State]]
    """(cfg, state of rows, gradients [u, ...], steps so far with this one, column_sum) -> (d, state): row -= lr d."""


def learning_rate(
    cfg: config_tables.TableOptimizer, base: Float[Array, ""] | float, step: Int[Array, ""] | int, steps: int
) -> Float[Array, ""] | float:
    """The rate of step `step` of 0 ... steps - 1, where the model's is `base`."""
    if cfg.lr is not None:
        return cfg.lr
    if cfg.final_multiplier is None:
        return base * cfg.multiplier
    done = step / max(steps - 1, 1)
    return base * (cfg.multiplier + (cfg.final_multiplier - cfg.multiplier) * done)


def init_rows(cfg: config_tables.TableOptimizer, table: Float[Array, "n *row"]) -> State:
    """What the optimizer keeps of `table`, before the first step, with the layout of its rows."""
    return _rule(cfg).init(cfg, table)


def update_rows(
    cfg: config_tables.TableOptimizer,
    table: Float[Array, "n *row"],
    state: State,
    indices: Int[Array, "t k"],
    weights: Float[Array, "t k"],
    vectors: Float[Array, "t v"],
    *,
    lr: Float[Array, ""] | float,
    step: Int[Array, ""] | int,
    scale: Float[Array, ""] | float = 1.0,
    key: Key[Array, ""],
    origin: tuple[Int[Array, ""] | int, Int[Array, ""] | int] = (0, 0),
    row_sum: Sum = lambda x: x,
    column_sum: Sum = lambda x: x,
) -> tuple[Float[Array, "n *row"], State]:
    """One step, counted from 0, with the gradients g_r = scale * sum over i_tk = r of w_tk vectors_t.

    `table` may be the part of a table which this device has: `indices` count from its first row, and those outside are
    skipped; `vectors` has its columns. Then `origin` is the row and the column where the part begins, `column_sum` sums
    over the devices with other columns of these rows and `row_sum` over those with other rows; both inside a
    `jax.shard_map`. `key` is the run's: devices and replicas that have the same element round it alike.

    Table and state are changed in place where they are donated. Indices that are all outside change nothing, which is
    how to reject a step without a copy of the table.
    """
    rule = _rule(cfg)
    if cfg.clip_norm is not None:
        squares = squared_row_gradients(table.shape[0], indices, weights, vectors)
        norm = scale * jnp.sqrt(row_sum(column_sum(squares)))
        scale = scale * jnp.minimum(1.0, cfg.clip_norm / norm)
    key = jax.random.fold_in(key, step)

    def update(rows: tuple[Array, State], grads: Float[Array, "u v"], ids: Int[Array, " u"]) -> tuple[Array, State]:
        old, kept = rows
        grads = (scale * grads).reshape(old.shape)
        direction, kept = rule.direction(cfg, kept, grads, step + 1, column_sum)
        new = old.astype(jnp.float32) - lr * direction
        if table.dtype == jnp.bfloat16:
            bits = random_bits(key, origin[0] + ids, origin[1] + jnp.arange(new[0].size))
            new = round_stochastically(new, bits.reshape(new.shape))
        return new, kept

    return apply_row_gradients((table, state), indices, weights, vectors, update)


def _init_adam(cfg: config_tables.RowAdam, table: Array) -> State:
    return {"m": jnp.zeros_like(table, cfg.first_moment_dtype), "v": jnp.zeros_like(table, jnp.float32)}


def _adam(
    cfg: config_tables.RowAdam, kept: State, grads: Array, count: Array | int, column_sum: Sum
) -> tuple[Array, State]:
    m = cfg.b1 * kept["m"].astype(jnp.float32) + (1 - cfg.b1) * grads
    v = cfg.b2 * kept["v"] + (1 - cfg.b2) * grads * grads
    unbiased_m, unbiased_v = m / (1 - cfg.b1**count), v / (1 - cfg.b2**count)
    return unbiased_m / (jnp.sqrt(unbiased_v) + cfg.eps), {"m": m, "v": v}


def _init_adagrad(cfg: config_tables.RowAdagrad, table: Array) -> State:
    sharding = jax.typeof(table).sharding
    zeros = jnp.zeros(table.shape[0], jnp.float32)
    if not sharding.mesh.empty:
        zeros = jax.sharding.reshard(zeros, jax.sharding.PartitionSpec(sharding.spec[0]))
    return {"sum": zeros}


def _adagrad(
    cfg: config_tables.RowAdagrad, kept: State, grads: Array, count: Array | int, column_sum: Sum
) -> tuple[Array, State]:
    axes = tuple(range(1, grads.ndim))
    width = column_sum(grads[0].size)
    total = kept["sum"] + column_sum(jnp.sum(grads * grads, axes)) / width
    return grads / (jnp.expand_dims(jnp.sqrt(total), axes) + cfg.eps), {"sum": total}


TABLE_OPTIMIZERS: dict[type[config_tables.TableOptimizer], Rule] = {
    config_tables.RowAdam: Rule(_init_adam, _adam),
    config_tables.RowAdagrad: Rule(_init_adagrad, _adagrad),
}


def _rule(cfg: config_tables.TableOptimizer) -> Rule:
    rule = TABLE_OPTIMIZERS.get(type(cfg))
    if rule is None:
        known = ", ".join(cls.__name__ for cls in TABLE_OPTIMIZERS)
        raise ConfigError("optimizer.tables", f": {type(cfg).__name__} is not registered; known are {known}")
    return rule


def random_bits(key: Key[Array, ""], rows: Int[Array, " u"], columns: Int[Array, " v"]) -> UInt32[Array, "u v"]:
    """Uniform bits that are a function of key, row and column, whichever device asks for them.

    One random word per row and per column, mixed by a bijection of 32 bits (Wellons, 2018, "lowbias32"): far less
    arithmetic than a random word per element, and each element's bits are as uniform over keys as the words.
    """
    row_key, column_key = jax.random.split(key)
    words = jax.vmap(lambda key, i: jax.random.bits(jax.random.fold_in(key, i)), in_axes=(None, 0))
    x = words(row_key, rows)[:, None] ^ words(column_key, columns)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_stochastically(x: Float[Array, "*s"], bits: UInt32[Array, "*s"]) -> Shaped[Array, "*s"]:
    """float32 -> bfloat16, up with the probability that makes the expected value x; infinities and NaN stay."""
    # bfloat16 is the upper half of float32: what is added below it carries into it as often as it should.
    word = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    rounded = jax.lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)
