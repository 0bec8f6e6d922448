"""Fingerprints: the same on every mesh, another after any change."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from hybridlm.config import Mesh
from hybridlm.sharding import make_mesh
from hybridlm.train.fingerprint import as_text, diverged_replicas, fingerprints, of_host, of_slices

WORD = 2**32


def slow_fingerprint(words: list[int]) -> list[int]:
    """The formula of the module, word by word in Python's integers."""
    total = [0, 0]
    for position, word in enumerate(words):
        m = word ^ position * 0x9E3779B1 % WORD
        m = (m ^ m >> 16) * 0x85EBCA6B % WORD
        m = (m ^ m >> 13) * 0xC2B2AE35 % WORD
        m ^= m >> 16
        again = m * 0x27D4EB2F % WORD
        total = [(total[0] + m) % WORD, (total[1] + (again ^ again >> 15)) % WORD]
    return total


def drawn(rng: np.random.Generator, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return (9 * rng.standard_normal(shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32, np.int8, np.bool_, np.complex64], ids=str)
def test_the_formula_holds_on_host_and_devices(dtype: Any, rng: np.random.Generator) -> None:
    x = drawn(rng, dtype, (5, 7, 3))
    unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    expected = slow_fingerprint(x.reshape(-1).view(unsigned).tolist())
    assert of_host(x).tolist() == expected
    assert fingerprints(jnp.asarray(x)).tolist() == expected


def test_every_mesh_has_the_same(rng: np.random.Generator) -> None:
    x = drawn(rng, np.float32, (16, 24))
    seen = {as_text(of_host(x))}
    for mesh in (Mesh(), Mesh(fsdp=4), Mesh(fsdp=2, tensor=4), Mesh(data=1, fsdp=8)):
        with jax.set_mesh(make_mesh(mesh)) as _:
            axes = P("fsdp", "tensor"), P(("fsdp", "tensor"), None), P(None, "tensor"), P()
            seen |= {as_text(fingerprints(jax.device_put(x, spec))) for spec in axes}
    assert len(seen) == 1


def test_slices_have_those_of_arrays_of_their_own(rng: np.random.Generator) -> None:
    x = drawn(rng, np.float32, (3, 5, 4))
    expected = [of_host(part).tolist() for part in x]
    of_device, of_numpy = of_slices([(jnp.asarray(x), True), (x, True)])
    assert of_device.tolist() == of_numpy.tolist() == expected


def test_pieces_add_up(rng: np.random.Generator) -> None:
    x = drawn(rng, np.float32, (300, 451))  # more than a block
    assert (of_host(x[:101]) + of_host(x[101:], first=101 * 451)).tolist() == of_host(x).tolist()


def test_any_bit_and_any_order_changes_it(rng: np.random.Generator) -> None:
    x = drawn(rng, np.float32, (6, 5))
    seen = {as_text(of_host(x)), as_text(of_host(x.T)), as_text(of_host(x[::-1]))}
    for bit in range(32 * x.size):
        changed = x.copy()
        changed.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(as_text(of_host(changed)))
    assert len(seen) == 3 + 32 * x.size


def test_two_flipped_signs_do_not_cancel(rng: np.random.Generator) -> None:
    x = drawn(rng, np.float32, (64,))
    seen = set()
    for i in range(64):
        for j in range(i):
            changed = x.copy()
            changed[[i, j]] *= -1
            seen.add(as_text(of_host(changed)))
    assert len(seen) == 64 * 63 // 2


def test_one_changed_copy_is_found_and_named(rng: np.random.Generator) -> None:
    mesh = make_mesh(Mesh(data=4, tensor=2))
    sharding = jax.NamedSharding(mesh, P(None, "tensor"))
    x = drawn(rng, np.float32, (6, 8))

    def put(flipped: int | None) -> jax.Array:
        copies = []
        for i, (device, index) in enumerate(sharding.devices_indices_map(x.shape).items()):
            copy = x[index].copy()
            if i == flipped:
                copy.view(np.uint32)[3, 1] ^= 1
            copies.append(jax.device_put(copy, device))
        return jax.make_array_from_single_device_arrays(x.shape, sharding, copies)

    whole = jax.device_put(x, jax.NamedSharding(mesh, P("data" if x.shape[0] % 4 == 0 else None, "tensor")))
    with jax.set_mesh(mesh):
        assert diverged_replicas({"params": {"w": put(None), "v": whole}}) == []
        for flipped in (0, 5):
            assert diverged_replicas({"params": {"w": put(flipped), "v": whole}}) == ["params.w"]
