"""Checks of operands' values, for hunting down what goes wrong: off unless asked for, since they read every operand."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

_checking = contextvars.ContextVar("checking", default=False)


@contextlib.contextmanager
def check_values() -> Iterator[None]:
    """Within, operations that are called or traced raise where a value is out of range, such as a positive log decay.

    ValueError where values are known; under `jit` the compiled function raises JAX's runtime error with the same line.
    """
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def check_range(name: str, array: Array, low: float, high: float) -> None:
    """Within `check_values`, every element of `array` must lie in [low, high]."""
    if not _checking.get():
        return

    def check(smallest: Array, largest: Array) -> None:
        if not (low <= smallest and largest <= high):
            rule = f"at most {high:g}" if low == -float("inf") else f"in [{low:g}, {high:g}]"
            raise ValueError(f"{name}: values from {float(smallest):g} to {float(largest):g} must be {rule}")

    ends = jnp.min(array), jnp.max(array)
    if any(isinstance(x, Tracer) for x in ends):
        jax.debug.callback(check, *ends)
    else:
        check(*ends)
