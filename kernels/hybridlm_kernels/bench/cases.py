"""The operations that the bench knows: random operands, floors, oracle, implementations, peers. A new operation adds a
`Case`. Letters: b batch, t time, d channels, w taps, h heads, k key dim, v value dim. Of
`grouped_matmul`: m rows, k inputs, n outputs, g groups. Of `memory_lookup`: t tokens, k rows per token, n rows, v row
width.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import hybridlm_kernels as kernels
from hybridlm_kernels.bench import oracles, peers
from hybridlm_kernels.dispatch import IMPLS

Shape = tuple[int, ...]
"""The numbers that a case's `dims` names, batch and time first."""
Operands = tuple[Array, ...]
Function = Callable[..., Array]
"""From the operands of a case to its output."""

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
DTYPES = ("bfloat16", "float32")
TAPS = 4
CHANNEL_SHAPES: dict[str, list[Shape]] = {
    "cpu": [(4, 1024, 256)],
    "gpu": [(8, 4096, 2560)],
    "tpu": [(8, 4096, 2560)],
    "static": [(1, 8192, 2560), (1, 8192, 5632)],
}
HEAD_SHAPES: dict[str, list[Shape]] = {
    "cpu": [(1, 1024, 4, 64, 64)],
    "gpu": [(2, 8192, 16, 128, 128)],
    "tpu": [(2, 8192, 16, 128, 128)],
    "static": [(1, 8192, 16, 128, 128)],
}
GROUP_SHAPES: dict[str, list[Shape]] = {
    "cpu": [(4096, 512, 1024, 8), (4096, 512, 1024, 64)],
    "gpu": [(131072, 2048, 1024, 64)],
    "tpu": [(131072, 2048, 1024, 8), (16384, 2048, 1024, 64)],
    "static": [(16384, 2048, 1024, 16), (16384, 2048, 1024, 64)],
}
LOOKUP_SHAPES: dict[str, list[Shape]] = {
    "cpu": [(2048, 32, 65536, 512)],
    "gpu": [(16384, 64, 1048576, 512)],
    "tpu": [(4096, 64, 1048576, 512)],
    "static": [(4096, 64, 1048576, 512)],
}
CHUNK = 64
"""Tokens of a chunk in the count of what the chunkwise form has to multiply."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a pass has to do at the least: HBM traffic and arithmetic, of it matrix multiplication."""

    hbm_bytes: int
    flops: int
    mxu_flops: int = 0

    def __add__(self, other: "Floor") -> "Floor":
        return Floor(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation, or one form of it, with what its shapes are made of and those to take unless told."""

    op: str
    operands: Callable[[Array, Shape, str], Operands]
    ours: Callable[..., Array]
    oracle: Callable[..., tuple[Any, tuple[Any, ...]]]
    """From float64 operands and the output's cotangent to the output and the operands' cotangents."""
    floors: Callable[[Shape, str], tuple[Floor, Floor]]
    """Of the forward and of the backward pass."""
    peers: dict[str, Function]
    dims: str = "B,T,D"
    shapes: dict[str, list[Shape]] = dataclasses.field(default_factory=lambda: CHANNEL_SHAPES)
    """By platform, and "static" for what is compiled only."""
    cut: Shape = (2, 300, 4096)
    """The largest that is compared with the oracle, a loop in NumPy. 300 tokens fill no block."""
    yardsticks: tuple[str, ...] = ()
    """Peers that compute something else of the same size: timed, and not compared with the oracle."""

    def implementations(self) -> tuple[str, ...]:
        """Every name that `function` takes: our own first, then the peers."""
        return (*(impl for impl in IMPLS if impl != "auto"), *self.peers)

    def function(self, impl: str) -> Function:
        return self.peers[impl] if impl in self.peers else partial(self.ours, impl=impl)

    def floor(self, shape: Shape, dtype: str, which: str) -> Floor:
        forward, backward = self.floors(shape, dtype)
        return forward if which == FORWARD else forward + backward


@dataclasses.dataclass(frozen=True)
class Workload:
    """One thing to compile: an implementation of an operation, a pass, a shape."""

    op: str
    impl: str
    which: str
    shape: Shape
    dtype: str

    @property
    def case(self) -> Case:
        return CASES[self.op]

    def program(self) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
        """The function to compile and its operands: for both passes the output's cotangent comes last."""
        function = self.case.function(self.impl)
        # A key made outside would be computed, on the mesh in scope, which may be of a device that is not there.
        operands = jax.eval_shape(lambda: self.case.operands(jax.random.key(0), self.shape, self.dtype))
        if self.which == FORWARD:
            return function, operands
        return with_gradient(function), (*operands, jax.eval_shape(function, *operands))

    def __str__(self) -> str:
        return f"{self.op} {self.impl} {self.which} {'x'.join(map(str, self.shape))} {self.dtype}"


def with_gradient(function: Function) -> Callable[..., tuple[Array, Operands]]:
    """`function` and, from its output's cotangent as the last operand, the cotangents of all its operands."""

    def run(*operands: Array) -> tuple[Array, Operands]:
        output, vjp = jax.vjp(function, *operands[:-1])
        return output, vjp(operands[-1])

    return run


def _normal(key: Array, *shapes: Sequence[int]) -> list[Array]:
    return [jax.random.normal(k, shape) for k, shape in zip(jax.random.split(key, len(shapes)), shapes, strict=True)]


def _scan_operands(key: Array, shape: Shape, dtype: str) -> Operands:
    """Decays mostly between 0.5 and 1."""
    a, x = _normal(key, shape, shape)
    return jax.nn.sigmoid(a + 2).astype(dtype), x.astype(dtype)


def _rg_lru_operands(key: Array, shape: Shape, dtype: str) -> Operands:
    """Decays between 0.9 and 0.999 where the recurrence gate is open, as Griffin initialises them."""
    x, gate_a, gate_x = (v.astype(dtype) for v in _normal(key, shape, shape, shape))
    rate = -jnp.log(jnp.linspace(0.9, 0.999, shape[2])) / 8
    return x, gate_a, gate_x, jnp.log(jnp.expm1(rate))


def _conv_operands(key: Array, shape: Shape, dtype: str) -> Operands:
    x, w, bias = _normal(key, shape, (TAPS, shape[2]), shape[2:])
    return x.astype(dtype), w, bias


def _qkv(key: Array, shape: Shape, dtype: str) -> tuple[Operands, Array]:
    """Queries, keys of unit norm, values, and a key to draw what else there is."""
    b, t, h, k, v = shape
    now, later = jax.random.split(key)
    q, keys, values = _normal(now, (b, t, h, k), (b, t, h, k), (b, t, h, v))
    keys = keys * jax.lax.rsqrt(jnp.sum(keys**2, axis=-1, keepdims=True))
    return (q.astype(dtype), keys.astype(dtype), values.astype(dtype)), later


def _log_decay(key: Array, shape: Sequence[int]) -> Array:
    """Half-lives from one token to seven hundred, evenly over their logarithms."""
    return -jnp.exp(jax.random.uniform(key, shape, minval=jnp.log(1e-3), maxval=jnp.log(0.7)))


def _attention_operands(per_channel: bool, key: Array, shape: Shape, dtype: str) -> Operands:
    qkv, key = _qkv(key, shape, dtype)
    b, t, h, k, _ = shape
    return *qkv, _log_decay(key, (b, t, h, k) if per_channel else (b, t, h))


def _delta_operands(per_channel: bool, key: Array, shape: Shape, dtype: str) -> Operands:
    *qkv, log_decay = _attention_operands(per_channel, key, shape, dtype)
    beta = jax.nn.sigmoid(jax.random.normal(jax.random.fold_in(key, 1), shape[:3]))
    return *qkv, beta, log_decay


def _group_operands(key: Array, shape: Shape, dtype: str) -> Operands:
    m, k, n, g = shape
    x, w = _normal(key, (m, k), (g, k, n))
    return x.astype(dtype), (w / k**0.5).astype(dtype)


def group_sizes(num_rows: int, num_groups: int) -> np.ndarray:
    """Groups of all the rows whose sizes differ by half of their mean, so that borders fall anywhere."""
    weights = np.random.default_rng(0).dirichlet(np.full(num_groups, 4.0))
    return np.diff(np.round(np.cumsum(weights) * num_rows), prepend=0).astype(np.int32)


def _known_at_run_time(x: Array, w: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.asarray(group_sizes(x.shape[0], w.shape[0])))


def _group_floors(shape: Shape, dtype: str) -> tuple[Floor, Floor]:
    """Operands and results once: x, w -> y; x, w, dy -> dx, dw."""
    m, k, n, g = shape
    rows, weights, size = m * (k + n), g * k * n, jnp.dtype(dtype).itemsize
    flops = 2 * m * k * n
    backward = Floor((2 * m * k + m * n + 2 * weights) * size, 2 * flops, 2 * flops)
    return Floor((rows + weights) * size, flops, flops), backward


def _lookup_operands(key: Array, shape: Shape, dtype: str) -> Operands:
    t, k, n, v = shape
    table, weights = _normal(key, (n, v // 128, 128), (t, k))
    return table.astype(dtype), weights.astype(dtype)


def row_indices(shape: Shape, num_rows: int) -> np.ndarray:
    """[t, k], any row as likely as any other, so that no cache helps."""
    return np.random.default_rng(0).integers(0, num_rows, shape, np.int32)


def _read_at_run_time(table: Array, weights: Array) -> Array:
    return jax.lax.optimization_barrier(jnp.asarray(row_indices(weights.shape, table.shape[0])))


def _lookup_floors(shape: Shape, dtype: str) -> tuple[Floor, Floor]:
    """Every pair's row, weights, indices -> y; each row that is used, weights, indices, dy -> dtable, dweights."""
    t, k, n, v = shape
    pairs, size = t * k, jnp.dtype(dtype).itemsize
    forward = Floor((pairs * v + pairs + t * v) * size + 4 * pairs, 2 * pairs * v)
    used = min(pairs, n)
    return forward, Floor((used * v + n * v + 2 * pairs + t * v) * size + 4 * pairs, 4 * pairs * v)


def _per_channel(streams: tuple[int, int], flops: tuple[int, int], shape: Shape, dtype: str) -> tuple[Floor, Floor]:
    """`streams` [b, t, d] arrays read and written and `flops` operations per element, each (forward, backward); a
    transcendental function counts as one."""
    elements = shape[0] * shape[1] * shape[2]
    forward, backward = (
        Floor(s * elements * jnp.dtype(dtype).itemsize, f * elements) for s, f in zip(streams, flops, strict=True)
    )
    return forward, backward


def _per_state(gates: Callable[[int], int], erases: bool, shape: Shape, dtype: str) -> tuple[Floor, Floor]:
    """Operands and results once; the chunkwise form's products with chunks of 64, the triangular inverse left out.

    `gates` numbers of float32 per head and token. The backward pass reads the operands and the output's cotangent,
    writes the operands' cotangents, and multiplies twice for each product of the forward pass and once more to have the
    scores and what was written again.
    """
    b, t, h, k, v = shape
    tokens, size = b * t * h, jnp.dtype(dtype).itemsize
    scores = (2 if erases else 1) * CHUNK * k + (2 if erases else 1) * CHUNK * v
    states = (3 if erases else 2) * k * v
    read = (2 * k + v) * size + 4 * gates(k)
    flops = 2 * tokens * (scores + states)
    forward = Floor(tokens * (read + v * size), flops, flops)
    return forward, Floor(tokens * (2 * read + v * size), 3 * flops, 3 * flops)


def _attend(q: Array, k: Array, v: Array, log_decay: Array, impl: str) -> Array:
    return kernels.gated_linear_attention(q, k, v, log_decay, impl=impl)[0]


def _delta(q: Array, k: Array, v: Array, beta: Array, log_decay: Array, impl: str) -> Array:
    return kernels.gated_delta_rule(q, k, v, beta, log_decay, impl=impl)[0]


_HEADS: Any = {"dims": "B,T,H,K,V", "shapes": HEAD_SHAPES, "cut": (1, 150, 2, 128, 128)}
CASES = {
    case.op: case
    for case in (
        Case(
            "linear_scan",
            _scan_operands,
            lambda a, x, impl: kernels.linear_scan(a, x, impl=impl)[0],
            oracles.linear_scan,
            partial(_per_channel, (3, 5), (2, 3)),  # a, x -> h; a, h, dh -> da, dx
            peers={"associative_scan": peers.associative_scan, "recurrentgemma": peers.recurrentgemma_scan},
        ),
        Case(
            "rg_lru",
            _rg_lru_operands,
            lambda x, gate_a, gate_x, decay, impl: kernels.rg_lru(x, gate_a, gate_x, decay, impl=impl)[0],
            oracles.rg_lru,
            # x, both gates -> h; x, both gates, h, dh -> dx, those of both gates
            partial(_per_channel, (4, 8), (12, 30)),
            peers={
                "associative_scan": partial(peers.unfused_rg_lru, peers.associative_scan),
                "recurrentgemma": partial(peers.unfused_rg_lru, peers.recurrentgemma_scan),
            },
        ),
        Case(
            "short_conv",
            _conv_operands,
            lambda x, w, bias, impl: kernels.short_conv(x, w, bias=bias, activation="silu", impl=impl)[0],
            oracles.short_conv,
            partial(_per_channel, (2, 3), (2 * TAPS + 3, 6 * TAPS + 8)),  # x -> y; x, dy -> dx
            peers={"lax_conv": peers.lax_conv},
        ),
        Case(
            "gated_linear_attention",
            partial(_attention_operands, False),
            _attend,
            oracles.gated_linear_attention,
            partial(_per_state, lambda k: 1, False),
            peers={},
            **_HEADS,
        ),
        Case(
            "gated_linear_attention_per_channel",
            partial(_attention_operands, True),
            _attend,
            oracles.gated_linear_attention,
            partial(_per_state, lambda k: k, False),
            peers={"deltanet_tpu": peers.deltanet_tpu_gla},
            **_HEADS,
        ),
        Case(
            "gated_delta_rule",
            partial(_delta_operands, False),
            _delta,
            oracles.gated_delta_rule,
            partial(_per_state, lambda k: 2, True),
            peers={"deltanet_tpu": peers.deltanet_tpu_gdn, "solve_triangular": peers.solve_triangular_delta_rule},
            **_HEADS,
        ),
        Case(
            "gated_delta_rule_per_channel",
            partial(_delta_operands, True),
            _delta,
            oracles.gated_delta_rule,
            partial(_per_state, lambda k: k + 1, True),
            peers={"deltanet_tpu": peers.deltanet_tpu_kda},
            **_HEADS,
        ),
        Case(
            "grouped_matmul",
            _group_operands,
            lambda x, w, impl: kernels.grouped_matmul(x, w, _known_at_run_time(x, w), impl=impl),
            lambda x, w, dy: oracles.grouped_matmul(x, w, group_sizes(len(x), len(w)), dy),
            _group_floors,
            peers={
                "megablox": lambda x, w: peers.megablox(x, w, _known_at_run_time(x, w)),
                "ragged_dot": lambda x, w: peers.ragged_dot(x, w, _known_at_run_time(x, w)),
                "dense": peers.dense_matmul,
            },
            yardsticks=("dense",),
            dims="M,K,N,G",
            shapes=GROUP_SHAPES,
            cut=(700, 256, 128, 8),
        ),
        Case(
            "memory_lookup",
            _lookup_operands,
            lambda table, weights, impl: kernels.memory_lookup(
                table, _read_at_run_time(table, weights), weights, impl=impl
            ),
            lambda table, weights, dy: oracles.memory_lookup(
                table, row_indices(weights.shape, len(table)), weights, dy
            ),
            _lookup_floors,
            peers={
                "take": lambda table, weights: peers.take(table, _read_at_run_time(table, weights), weights),
                "neighbours": peers.neighbours,
            },
            yardsticks=("neighbours",),
            dims="T,K,N,V",
            shapes=LOOKUP_SHAPES,
            cut=(200, 12, 3000, 256),
        ),
    )
}
