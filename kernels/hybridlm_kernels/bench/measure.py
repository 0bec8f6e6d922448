"""Time on the device at hand: every implementation is first compared with the oracle, then timed in turns.

Letters: b batch, t time, d channels.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hybridlm_kernels.bench.cases import BOTH, FORWARD, Case, Floor, Operands, Shape, Workload, with_gradient

WINDOWS, WINDOW_S = 9, 0.05
TOLERANCES = {"bfloat16": (1e-2, 3e-2), "float32": (1e-5, 1e-4)}
"""Relative L2 of the output and of each gradient. bfloat16 keeps 8 bits, and the gradient reads a rounded state."""


@dataclasses.dataclass(frozen=True)
class Errors:
    """Relative L2 distance from the oracle of the output and of the worst gradient, and what is allowed."""

    output: float
    gradient: float
    allowed: tuple[float, float]

    @property
    def acceptable(self) -> bool:
        """False for NaN too."""
        return self.output <= self.allowed[0] and self.gradient <= self.allowed[1]

    def __str__(self) -> str:
        sign = "<=" if self.acceptable else "exceed"
        return f"relative errors {self.output:.1e}, {self.gradient:.1e} {sign} {self.allowed[0]:g}, {self.allowed[1]:g}"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call: one number from each window of several calls."""

    minimum: float
    median: float
    maximum: float
    compile_s: float


def check(case: Case, impl: str, shape: Shape, dtype: str) -> Errors:
    """How far `impl` is from the oracle at `shape` cut short."""
    operands, cotangent = random_operands(case, tuple(map(min, shape, case.cut)), dtype)
    output, gradients = jax.jit(with_gradient(case.function(impl)))(*operands, cotangent)
    expected, slopes = case.oracle(*map(_float64, (*operands, cotangent)))
    worst = max(_distance(got, want) for got, want in zip(gradients, slopes, strict=True))
    return Errors(_distance(output, expected), worst, TOLERANCES[dtype])


def random_operands(case: Case, shape: Shape, dtype: str) -> tuple[Operands, Array]:
    """The operands, and a cotangent of the output."""

    def make() -> tuple[Operands, Array]:
        keys = jax.random.split(jax.random.key(0))
        operands = case.operands(keys[0], shape, dtype)
        output = jax.eval_shape(case.function("chunked"), *operands)
        return operands, jax.random.normal(keys[1], output.shape).astype(output.dtype)

    return jax.block_until_ready(jax.jit(make)())


def _float64(array: Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32), np.float64)


def _distance(got: Array, want: np.ndarray) -> float:
    return float(np.linalg.norm(_float64(got) - want) / np.linalg.norm(want))


def time_all(workloads: list[Workload]) -> dict[str, Timing]:
    """Per implementation of one operation, pass, shape and dtype; windows of the implementations take turns."""
    first = workloads[0]
    operands, cotangent = random_operands(first.case, first.shape, first.dtype)
    operands = operands if first.which == FORWARD else (*operands, cotangent)
    runs: dict[str, tuple[Callable[[], Any], float]] = {}
    for workload in workloads:
        function = workload.case.function(workload.impl)
        runs[workload.impl] = _compile(with_gradient(function) if workload.which == BOTH else function, operands)
    return _windows(runs)


def copy_bandwidth(floor: Floor) -> float:
    """Bytes per second, read and written, of adding one to an array: as many bytes as `floor` has."""
    elements = max(1, floor.hbm_bytes // (2 * 4))
    array = jax.block_until_ready(jnp.zeros((elements,), jnp.int32))
    run, compile_s = _compile(lambda x: x + 1, (array,))
    return 2 * 4 * elements / _windows({"copy": (run, compile_s)})["copy"].median


def _compile(function: Callable[..., Any], operands: Operands) -> tuple[Callable[[], Any], float]:
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*operands).compile()
    seconds = time.perf_counter() - start
    return lambda: compiled(*operands), seconds


def _windows(runs: dict[str, tuple[Callable[[], Any], float]]) -> dict[str, Timing]:
    calls = {}
    for name, (run, _) in runs.items():
        jax.block_until_ready(run())  # the first call loads the program
        calls[name] = max(1, round(WINDOW_S / _seconds(run, 1)))
        _seconds(run, calls[name])
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WINDOWS):
        for name, (run, _) in runs.items():
            samples[name].append(_seconds(run, calls[name]))
    return {
        name: Timing(min(times), statistics.median(times), max(times), runs[name][1]) for name, times in samples.items()
    }


def _seconds(run: Callable[[], Any], calls: int) -> float:
    """Per call, waiting for the last one alone: a device works through them in order."""
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls
