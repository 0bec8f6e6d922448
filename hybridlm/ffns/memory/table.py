"""Tables of rows that memory layers read, spread over devices and never gathered.

Letters: b batch, t time, c reads of a token that are added up apart, k rows per read, v row width, n tokens (b t c).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from hybridlm_kernels import memory_lookup, memory_scores
from hybridlm_kernels.memory_lookup.row_gradients import row_usage, usage_metrics
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import RECORDED, Pass
from hybridlm.mixers.base import Context
from hybridlm.sharding import RULES, axis_size, constrain, per_device, position, total

LANES = 128
"""Columns that stay together: narrower blocks lie column by column in a TPU's memory."""
MAX_READS = 2**31 - 1
"""Of all devices in a step; their places are counted in 31 bits."""


class Table(nnx.Module):
    """Rows for all layers with one config: `num_tables` tables below each other, of which each layer reads one.

    `name` is that of the table in `Pass.shared`, of its tap and of what it records. With a tap, the table itself is not
    differentiated: what it was asked for is recorded, and the tap's cotangent is that of the answer (see `Reads`).
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        cfg: config.Memory,
        context: Context,
        rngs: nnx.Rngs,
        init: Callable[..., jax.Array],
        reads_per_token: int,
        weighted: bool = True,
    ):
        """`weighted`: its rows are read by `lookup`, whose weights tell how the table is used; else by `scores`."""
        self.name, self.rows, self.impl, self.weighted = name, rows, context.kernels.memory_lookup, weighted
        layers = layers_of(cfg, context)
        self.num_tables = num_tables(cfg, context)
        first_rows = {layer: rank * self.num_tables // len(layers) * rows for rank, layer in enumerate(layers)}
        self.first_rows = tuple(first_rows.get(layer, 0) for layer in range(max(layers) + 1))
        tiles, lanes = (width // LANES, LANES) if width % LANES == 0 else (1, width)
        shape = (self.num_tables * rows, tiles, lanes)
        self.row_axis, self.column_axis = layout(cfg.spread, shape, cfg.table_dtype, reads_per_token)
        value = constrain(init(rngs.params(), shape, jnp.float32), *self.axes)
        self.table = nnx.Param(value.astype(cfg.table_dtype))

    @property
    def axes(self) -> tuple[str, str | None, None]:
        """Logical, of the parameter."""
        return self.row_axis, self.column_axis, None

    def lookup(
        self, indices: Int[Array, "b t *c k"], weights: Float[Array, "b t *c k"], given: Pass
    ) -> tuple[Float[Array, "b t *c v"], dict[str, Array]]:
        """y = sum_k w_k table[i_k], for rows counted within the layer's own table; a negative one counts nothing.

        y has the dtype of `weights`. Also what is recorded, for the aux values.
        """
        indices = self._of_layer(indices, given)
        y = self._spread(_lookup, indices, weights, given)
        return self._tapped(y, given, indices=indices, weights=weights)

    def scores(
        self, indices: Int[Array, "b t *c k"], x: Float[Array, "b t *c v"], given: Pass
    ) -> tuple[Float[Array, "b t *c k"], dict[str, Array]]:
        """s_k = table[i_k] . x in the dtype of `x`, 0 for a negative row, and what is recorded (see `lookup`)."""
        indices = self._of_layer(indices, given)
        s = self._spread(_scores, indices, x, given)
        return self._tapped(s, given, indices=indices, vectors=x)

    def _of_layer(self, indices: Int[Array, "*n k"], given: Pass) -> Int[Array, "*n k"]:
        first = jnp.asarray(self.first_rows)[given.layer]
        return jnp.where(indices < 0, -1, indices + first)

    def _spread(self, read: Callable[..., Array], indices: Array, operand: Array, given: Pass) -> Array:
        table = self.table[...]
        if given.taps is not None:
            table = jax.lax.stop_gradient(table)
        spread = self.spread()

        def of_device(table: Array, indices: Array, operand: Array) -> Array:
            # One axis of tokens, for the exchange.
            flat = indices.reshape(-1, indices.shape[-1]), operand.reshape(-1, operand.shape[-1])
            return read(spread, table, *flat, self.impl).reshape(*indices.shape[:-1], -1)

        tokens = ("batch",)
        return per_device(of_device, in_axes=(self.axes, tokens, tokens), out_axes=tokens)(table, indices, operand)

    def _tapped(self, answer: Array, given: Pass, **asked: Array) -> tuple[Array, dict[str, Array]]:
        if given.taps is None:
            return answer, {}
        recorded = {f"{RECORDED}{self.name}/{what}": value for what, value in asked.items()}
        return answer + given.taps[self.name].astype(answer.dtype), recorded

    def updated(
        self,
        change: Callable[..., tuple[Array, Any]],
        state: dict[str, Array],
        reads: list["Read"],
        wanted: Bool[Array, ""],
        told: dict[str, Array],
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
        """The table, the `state` of its rows, and how it was used, after `change(table, state, indices, weights,
        vectors, **told, **places)`.

        That is given this device's part of the table, all that was read of it, where it begins (`origin`), and the sums
        over the devices that have other rows or columns (`row_sum`, `column_sum`). Unless `wanted`, no row was read.

        Raises ConfigError where a step reads more than `MAX_READS` rows.
        """
        spread, num_rows = self.spread(), self.table[...].shape[0]

        def of_device(
            table: Array, state: Any, reads: list[Read], wanted: Array, told: dict[str, Array]
        ) -> tuple[Array, dict[str, Array], dict[str, Array]]:
            indices, weights, vectors = (
                jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in parts]) for parts in zip(*reads, strict=True)
            )
            indices, weights = (_of_replicas(spread.gather(x)) for x in (indices, weights))
            if indices.size > MAX_READS:
                problem = f": {indices.size:,} reads of a memory in one step are more than the 2^31 that can be sorted"
                raise ConfigError("train.batch_size", f"{problem}; choose a smaller batch")
            indices = jnp.where(wanted & (indices >= 0), indices, num_rows)
            rows = spread.local_rows(indices, table)
            vectors = _of_replicas(spread.gather_columns(vectors))
            sums = {"row_sum": _sum_over(spread.rows), "column_sum": _sum_over(spread.columns)}
            origin = spread.origin(table)
            table, state = change(table, state, rows, weights, vectors, origin=origin, **sums, **told)
            if not self.weighted:
                return table, state, {}
            # Asked as the update asks, so that both have one sort.
            part = {"first_row": origin[0], "num_local": table.shape[0]}
            usage = row_usage(rows, weights, num_rows, self.num_tables, **part)
            used, divergence = usage_metrics(jax.tree.map(_sum_over(spread.rows), usage), self.rows)
            return table, state, {"memory_used": used, "memory_kl": divergence}

        state_axes = {name: self.axes if x.ndim == 3 else self.axes[:1] for name, x in state.items()}
        in_axes, out_axes = (self.axes, state_axes, ("batch",), (), ()), (self.axes, state_axes, ())
        return per_device(of_device, in_axes, out_axes)(self.table[...], state, reads, wanted, told)

    def spread(self) -> "Spread":
        """Where the rows and columns of this device lie; for use inside `per_device` too."""
        return Spread(self.row_axis, self.column_axis)


class Read(NamedTuple):
    """What was asked of a table, and what came of it: the gradient of row r is sum over i = r of w vector."""

    indices: Int[Array, "b *n k"]
    """Rows of all tables of a config, one after the other; negative ones are none."""
    weights: Float[Array, "b *n k"]
    vectors: Float[Array, "b *n v"]


@dataclass(frozen=True)
class Spread:
    """The exchange between tokens, which every device has its own of, and rows, likewise. Inside `per_device`.

    Bytes that a device receives for n tokens of its own, k rows each, of width v: indices and weights of all P devices,
    and y in parts: 2 n v (P - 1) by rows, 2 n v (P - 1) / P by columns, 2 n v (R - 1) + 2 n v (C - 1) / C as a grid.
    """

    rows: str
    """The logical axis. Devices along `tensor` have rows of their own, but the same tokens."""
    columns: str | None

    def local_rows(self, indices: Int[Array, "n k"], table: Array) -> Int[Array, "n k"]:
        """Counted from the first row of this device; others lie outside its part."""
        return indices - position(self.rows) * table.shape[0]

    def origin(self, table: Array) -> tuple[Array | int, Array | int]:
        """The row and the column where the part `table` of this device begins."""
        row = position(self.rows) * table.shape[0]
        return row, 0 if self.columns is None else position(self.columns) * table.shape[1] * table.shape[2]

    def gather(self, x: Array) -> Array:
        """What all devices have of these tokens: [n, ...] -> [rows' parts x columns' parts x n, ...]."""
        for axes in (_token_axes(self.columns), _token_axes(self.rows)):
            if axes:
                x = jax.lax.all_gather(x, axes, axis=0, tiled=True)
        return x

    def gather_columns(self, x: Float[Array, "n v"]) -> Float[Array, "m w"]:
        """This device's columns of the tokens of all."""
        if axes := _token_axes(self.columns):
            x = jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=0, tiled=True)
        if axes := _token_axes(self.rows):
            x = jax.lax.all_gather(x, axes, axis=0, tiled=True)
        return x

    def scatter_columns(self, y: Float[Array, "m w"]) -> Float[Array, "n v"]:
        """All columns of this device's tokens: sums over the devices that hold rows, blocks from those of columns."""
        if axes := _token_axes(self.rows):
            y = jax.lax.psum_scatter(y, axes, scatter_dimension=0, tiled=True)
        y = total(y, "tensor_rows")
        if axes := _token_axes(self.columns):
            y = jax.lax.all_to_all(y, axes, split_axis=0, concat_axis=1, tiled=True)
        return y

    def scatter(self, x: Float[Array, "m k"]) -> Float[Array, "n k"]:
        """Sums over all devices, of this device's tokens."""
        for axes in (_token_axes(self.rows), _token_axes(self.columns)):
            if axes:
                x = jax.lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)
        return total(x, "tensor_rows")


def _lookup(spread: Spread, table: Array, indices: Array, weights: Array, impl: str) -> Array:
    rows = spread.local_rows(spread.gather(indices), table)
    return spread.scatter_columns(memory_lookup(table, rows, spread.gather(weights), impl=impl))


def _scores(spread: Spread, table: Array, indices: Array, x: Array, impl: str) -> Array:
    rows = spread.local_rows(spread.gather(indices), table)
    return spread.scatter(memory_scores(table, rows, spread.gather_columns(x), impl=impl))


def _of_replicas(x: Array) -> Array:
    """What the devices that have the same part of a table have been asked for."""
    return x if axis_size("replicas") == 1 else jax.lax.all_gather(x, RULES["replicas"], axis=0, tiled=True)


def _sum_over(axis: str | None) -> Callable[[Any], Any]:
    return (lambda x: x) if axis is None else partial(total, logical=axis)


def _parts(axis: str | None) -> int:
    return 1 if axis is None else axis_size(axis)


def _token_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes of a table's axis along which tokens differ, where there are such devices."""
    axes = () if axis is None else tuple(name for name in RULES[axis] if name in RULES["batch"])
    mesh = jax.sharding.get_abstract_mesh()
    return axes if not mesh.empty and math.prod(mesh.shape[name] for name in axes) > 1 else ()


LAYOUTS: dict[str, tuple[str, str | None]] = {
    "columns": ("tensor_rows", "table_columns"),
    "grid": ("grid_rows", "grid_columns"),
    "rows": ("table_rows", None),
}


def layout(spread: str, shape: tuple[int, int, int], dtype: str, reads_per_token: int) -> tuple[str, str | None]:
    """The logical axes of a table's rows and columns. Raises ConfigError where it does not divide by the mesh.

    `auto` is, of those that divide, the one for which a device receives the fewest bytes (see `Spread`). It leaves out
    blocks of 128 columns in bfloat16: TPUs keep their rows in pairs, out of reach of the kernels that copy single rows.
    """
    rows, tiles, _ = shape
    fitting = {
        name: axes for name, axes in LAYOUTS.items() if rows % _parts(axes[0]) == 0 and tiles % _parts(axes[1]) == 0
    }
    if spread == "auto" and dtype == "bfloat16":
        fitting = {name: axes for name, axes in fitting.items() if _parts(axes[1]) == 1 or tiles > _parts(axes[1])}
    if spread == "auto" and fitting:
        received = {name: received_bytes(shape, reads_per_token, *map(_parts, axes)) for name, axes in fitting.items()}
        return fitting[min(fitting, key=lambda name: received[name])]
    if spread not in fitting:
        axes = LAYOUTS["rows" if spread == "auto" else spread]
        raise ConfigError(
            "sharding.mesh",
            f": a memory's table of {rows} rows in {tiles} blocks of columns must divide by the {_parts(axes[0])} x "
            f"{_parts(axes[1])} devices of spread={spread!r}; choose another spread or num_rows",
        )
    return fitting[spread]


def received_bytes(shape: tuple[int, int, int], reads_per_token: int, row_parts: int, column_parts: int) -> float:
    """Per token of a device's own, forward, in bfloat16 with int32 indices."""
    width = shape[1] * shape[2]
    addresses = 6 * reads_per_token * (row_parts * column_parts - 1)
    return addresses + 2 * width * (row_parts - 1) + 2 * width * (column_parts - 1) / column_parts


def table_name(cfg: config.Memory, context: Context) -> str:
    """Unique among the kinds of memories of a model."""
    kinds = list(dict.fromkeys(memory for ffn in context.ffns for memory in memories_of(ffn)))
    return f"memory_{kinds.index(cfg) if cfg in kinds else 0}"


def layers_of(cfg: config.Memory, context: Context) -> list[int]:
    """The layers that read the tables of this config."""
    return [i for i, ffn in enumerate(context.ffns) if cfg in memories_of(ffn)] or [0]


def num_tables(cfg: config.Memory, context: Context) -> int:
    layers = len(layers_of(cfg, context))
    return layers if cfg.num_tables is None else min(cfg.num_tables, layers)


def memories_of(ffn: config.FFN | None) -> list[config.Memory]:
    if isinstance(ffn, config.Beside):
        return [ffn.memory]
    return [ffn] if isinstance(ffn, config.Memory) else []


def tap(context: Context, batch: int, length: int, *rest: int) -> Array:
    """Zeros that a read's answer is added to; what a gradient step learns of it is the tap's cotangent."""
    return constrain(jnp.zeros((batch, length, *rest), context.dtype), "batch", None, *(None for _ in rest))
