"""Products with weights and lookups on a mesh: their gradients, and the dtype that devices add them up in."""

import contextlib
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from hybridlm.config import Mesh
from hybridlm.layers import contract, gather_weight, gradient_dtype, look_up
from hybridlm.sharding import make_mesh, per_device, spec

TOKENS, D, H, K = 64, 16, 4, 6
B, T, V = 8, 14, 48
MESHES = (
    None,
    {"data": 1},
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "expert": 2, "tensor": 2},
    {"expert": 2, "context": 2, "tensor": 2},
    {"slices": 2, "fsdp": 2, "context": 2},
)
on_every_mesh = pytest.mark.parametrize("axes", MESHES, ids=str)


def operands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return rng.standard_normal((TOKENS, D)), rng.standard_normal((D, H, K)), rng.standard_normal((TOKENS, H, K))


def contracted(x: Any, w: Any) -> Any:
    return contract("nd,dhk->nhk", x, w, "batch", "heads", None)


def gathered(x: Any, w: Any) -> Any:
    """The same product in a `jax.shard_map`, from weights that are gathered there."""

    def of_device(x: Any, w: Any) -> Any:
        return jnp.einsum("nd,dhk->nhk", x, gather_weight(w, 0, "embed", x.dtype.name))

    return per_device(of_device, (("batch", None), ("embed", "heads", None)), ("batch", "heads", None))(x, w)


def gradients(product: Any, x: Any, w: Any, dy: Any, dtype: Any, summed_in: str | None) -> tuple[Any, Any]:
    """Of sum(y dy) in x and w, with activations of `dtype`."""
    with jax.set_mesh(make_mesh(Mesh(data=2, fsdp=2, tensor=2))):

        def put(a: Any, dtype: Any, *axes: str | None) -> Any:
            return jax.device_put(jnp.asarray(a, dtype), NamedSharding(jax.sharding.get_mesh(), spec(*axes)))

        def objective(x: Any, w: Any, dy: Any) -> Any:
            return jnp.sum(product(x, w).astype(jnp.float32) * dy)

        args = put(x, dtype, "batch", None), put(w, jnp.float32, "embed", "heads", None)
        with gradient_dtype(summed_in):
            dx, dw = jax.jit(jax.grad(objective, argnums=(0, 1)))(*args, put(dy, jnp.float32, "batch", "heads", None))
        assert (dx.dtype, dw.dtype) == (dtype, jnp.float32)
        assert dw.sharding.spec == args[1].sharding.spec
    return np.asarray(dx, np.float64), np.asarray(dw, np.float64)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("product", [contracted, gathered])
@pytest.mark.parametrize(("summed_in", "tolerance"), [(None, 1e-6), ("float32", 1e-6), ("bfloat16", 5e-3)])
def test_gradients_of_float32(product: Any, summed_in: str | None, tolerance: float, rng: np.random.Generator) -> None:
    x, w, dy = operands(rng)
    dx, dw = gradients(product, x, w, dy, jnp.float32, summed_in)
    assert distance(dx, np.einsum("nhk,dhk->nd", dy, w)) < 1e-6
    error = distance(dw, np.einsum("nd,nhk->dhk", x, dy))
    assert error < tolerance
    # Sums that were rounded to bfloat16 cannot be closer than this.
    assert (error > 1e-4) == (summed_in == "bfloat16")


@pytest.mark.parametrize("product", [contracted, gathered])
def test_float32_sums_are_closer_than_those_of_bfloat16_activations(product: Any, rng: np.random.Generator) -> None:
    x, w, dy = (np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in operands(rng))
    want = np.einsum("nd,nhk->dhk", x, dy)
    by_activations, by_float32 = (
        distance(gradients(product, x, w, dy, jnp.bfloat16, summed_in)[1], want) for summed_in in (None, "float32")
    )
    assert 1e-3 < by_activations < 1e-2
    assert by_float32 < (1e-5 if product is contracted else by_activations)


def mesh_in_scope(axes: dict[str, int] | None) -> contextlib.AbstractContextManager[Any]:
    """Of as many devices as `axes` have; none where they are absent."""
    if axes is None:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(Mesh(**{"data": 1} | axes), jax.devices()[: math.prod(axes.values())]))


def placed(x: np.ndarray, *axes: str | None) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    return jnp.asarray(x) if mesh.empty else jax.device_put(x, NamedSharding(mesh, spec(*axes)))


def lookup_and_gradient(
    table: np.ndarray, tokens: np.ndarray, dx: np.ndarray, axes: dict[str, int] | None, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """table[tokens], and the gradient of sum(table[tokens] dx) in the table."""

    def of_table(table: Any, tokens: Any, dx: Any) -> Any:
        x, back = jax.vjp(lambda table: look_up(table, tokens, dtype), table)
        return x, *back(dx)

    with mesh_in_scope(axes):
        words = placed(table.astype(np.float32), "vocab", None), placed(tokens, "batch", None)
        return jax.jit(of_table)(*words, placed(dx, "batch", None, None).astype(dtype))


def lookup_operands(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of half the vocabulary, some of them often."""
    tokens = np.minimum(rng.integers(0, V, (B, T)), rng.integers(0, V, (B, T))).astype(np.int32)
    return rng.standard_normal((V, D)), np.where(tokens % 2, tokens, V - 1 - tokens), rng.standard_normal((B, T, D))


@on_every_mesh
def test_lookup_is_that_of_one_device(axes: dict[str, int] | None, rng: np.random.Generator) -> None:
    table, tokens, dx = lookup_operands(rng)
    x, dtable = lookup_and_gradient(table, tokens, dx, axes)
    np.testing.assert_array_equal(x, table.astype(np.float32)[tokens])
    want = np.zeros_like(table)
    for token, row in zip(tokens.reshape(-1), dx.reshape(-1, D), strict=True):
        want[token] += row
    assert distance(np.asarray(dtable, np.float64), want) < 1e-6
    assert dtable.dtype == jnp.float32


@pytest.mark.parametrize(
    ("axes", "summed_in", "low", "high"),
    [
        (None, None, 0.0, 1e-6),  # nothing travels
        ({"data": 2, "fsdp": 2, "tensor": 2}, None, 1e-3, 1e-2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "bfloat16", 1e-3, 1e-2),
        ({"data": 2, "fsdp": 2, "tensor": 2}, "float32", 0.0, 1e-6),
    ],
    ids=str,
)
def test_gradients_of_rows_are_added_up_in_float32(
    axes: dict[str, int] | None, summed_in: str | None, low: float, high: float, rng: np.random.Generator
) -> None:
    """Those of one word thirty times, in bfloat16: only what travels may be rounded."""
    dx = np.asarray(jnp.asarray(rng.standard_normal((B, T, D)), jnp.bfloat16), np.float64)
    with gradient_dtype(summed_in):
        _, dtable = lookup_and_gradient(np.ones((V, D)), np.full((B, T), 7, np.int32), dx, axes, jnp.bfloat16)
    assert low <= distance(np.asarray(dtable, np.float64)[7], dx.sum((0, 1))) < high


def test_a_lookup_moves_words_and_no_tokens() -> None:
    """Also where there are fewer tokens than words."""

    def objective(table: Any, tokens: Any) -> Any:
        return jnp.sum(look_up(table, tokens, jnp.float32) ** 2)

    with mesh_in_scope({"data": 2, "fsdp": 4}):
        words = (
            placed(np.ones((64 * V, D), np.float32), "vocab", None),
            placed(np.ones((B, 1), np.int32), "batch", None),
        )
        hlo = str(jax.jit(jax.grad(objective)).lower(*words).compile().as_text())
    moved = re.findall(r"= (\w+\[[\d,]*\])\S* (all-\w+|reduce-scatter|collective-permute)\(", hlo)
    assert set(moved) == {
        (f"f32[{64 * V},{D}]", "all-gather"),
        (f"f32[{16 * V},{D}]", "reduce-scatter"),
        (f"f32[{16 * V},{D}]", "all-reduce"),
    }
