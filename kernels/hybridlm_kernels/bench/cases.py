"""The operations that the bench knows: random operands, floors, oracle, implementations, peers. A new operation adds a
`Case`. Letters: b batch, t time, d channels, w taps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import hybridlm_kernels as kernels
from hybridlm_kernels.bench import oracles, peers
from hybridlm_kernels.dispatch import IMPLS

Shape = tuple[int, int, int]  # b, t, d
Operands = tuple[Array, ...]
Function = Callable[..., Array]
"""From the operands of a case to its output [b, t, d]."""

FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
DTYPES = ("bfloat16", "float32")
TAPS = 4


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
    """An operation. `streams` counts the [b, t, d] arrays read and written, `flops` the operations per element of one,
    each (forward, backward); a transcendental function counts as one."""

    op: str
    operands: Callable[[Array, Shape, str], Operands]
    ours: Callable[..., Array]
    oracle: Callable[..., tuple[Any, tuple[Any, ...]]]
    """From float64 operands and the output's cotangent to the output and the operands' cotangents."""
    streams: tuple[int, int]
    flops: tuple[int, int]
    peers: dict[str, Function]

    def implementations(self) -> tuple[str, ...]:
        """Every name that `function` takes: our own first, then the peers."""
        return (*(impl for impl in IMPLS if impl != "auto"), *self.peers)

    def function(self, impl: str) -> Function:
        return self.peers[impl] if impl in self.peers else partial(self.ours, impl=impl)

    def floor(self, shape: Shape, dtype: str, which: str) -> Floor:
        b, t, d = shape
        forward, backward = (
            Floor(streams * b * t * d * jnp.dtype(dtype).itemsize, flops * b * t * d)
            for streams, flops in zip(self.streams, self.flops, strict=True)
        )
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


CASES = {
    case.op: case
    for case in (
        Case(
            "linear_scan",
            _scan_operands,
            lambda a, x, impl: kernels.linear_scan(a, x, impl=impl)[0],
            oracles.linear_scan,
            streams=(3, 5),  # a, x -> h; a, h, dh -> da, dx
            flops=(2, 3),
            peers={"associative_scan": peers.associative_scan, "recurrentgemma": peers.recurrentgemma_scan},
        ),
        Case(
            "rg_lru",
            _rg_lru_operands,
            lambda x, gate_a, gate_x, decay, impl: kernels.rg_lru(x, gate_a, gate_x, decay, impl=impl)[0],
            oracles.rg_lru,
            streams=(4, 8),  # x, both gates -> h; x, both gates, h, dh -> dx, those of both gates
            flops=(12, 30),
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
            streams=(2, 3),  # x -> y; x, dy -> dx
            flops=(2 * TAPS + 3, 6 * TAPS + 8),
            peers={"lax_conv": peers.lax_conv},
        ),
    )
}
