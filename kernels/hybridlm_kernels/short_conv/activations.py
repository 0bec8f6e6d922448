"""What short_conv can apply to its sums."""

from collections.abc import Callable

import jax
from jax import Array

ACTIVATIONS: dict[str | None, Callable[[Array], Array]] = {
    None: lambda y: y,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}
