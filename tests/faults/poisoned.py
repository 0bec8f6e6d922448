"""A block that `hybridlm train --import tests.faults.poisoned` knows: its gradients are NaN in some steps.

Which, `poison.json` says in the directory that the process works in: `{"first": 7, "last": 9}`; without it, in none.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybridlm import config, ffns
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.gated_mlp import GatedMLP
from hybridlm.mixers.base import Carry, Segments

POISON = Path("poison.json")


@dataclass(frozen=True, kw_only=True)
class Poisoned(config.GeGLU):
    """GeGLU, whose gradients are spoilt."""


@jax.custom_vjp
def spoilt(x: Float[Array, "b t d"], bad: Int[Array, ""]) -> Float[Array, "b t d"]:
    """x; its gradient is NaN where `bad` is 1."""
    return x


def _forward(x: Array, bad: Array) -> tuple[Array, Array]:
    return x, bad


def _backward(bad: Array, gradient: Array) -> tuple[Array, None]:
    return jnp.where(bad == 1, jnp.nan, gradient), None


spoilt.defvjp(_forward, _backward)


class PoisonedMLP(GatedMLP):
    def __call__(
        self, x: Float[Array, "b t d"], segments: Segments, carry: Carry, given: Pass
    ) -> tuple[Float[Array, "b t d"], Aux, Carry]:
        if given.step is not None and POISON.exists():
            steps = json.loads(POISON.read_text())
            x = spoilt(x, ((given.step + 1 >= steps["first"]) & (given.step + 1 <= steps["last"])).astype(jnp.int32))
        return super().__call__(x, segments, carry, given)


ffns.ACTIVATIONS[Poisoned] = ffns.ACTIVATIONS[config.GeGLU]
ffns.register(Poisoned, PoisonedMLP, examples=(Poisoned(hidden=48),))
