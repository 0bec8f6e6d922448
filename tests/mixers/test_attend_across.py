"""Attention over a sequence cut over devices equals attention over the whole of it, gradients too.

Letters: b batch, t time on one device, T on all, p devices, h query heads, g key-value heads, k head dim.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hybridlm.mixers.attend import Band, attend, splash_attention
from hybridlm.mixers.attend_across import attend_across
from hybridlm.mixers.base import Segments
from tests.absent import absent_tpus

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, against float64
T = 48
OVER_TIME = PartitionSpec(None, "context")


def packed(rows: list[list[tuple[int, int]]]) -> Segments:
    """Each row a list of (id, number of tokens)."""
    ids = [np.concatenate([np.full(n, i) for i, n in row]) for row in rows]
    positions = [np.concatenate([np.arange(n) for _, n in row]) for row in rows]
    return Segments(jnp.asarray(np.stack(ids), jnp.int32), jnp.asarray(np.stack(positions), jnp.int32))


DOCUMENTS = packed(
    [
        [(1, T)],  # on all devices
        [(0, 3), (1, 17), (2, 1), (3, 3), (4, 23), (0, 1)],  # borders inside a stretch and at its edge
        [(0, 26), (5, 5), (0, 17)],  # whole devices of padding before and after
        [(7, 19), (7, 10), (7, 19)],  # an id that comes back: positions alone tell the documents apart
        [(0, T)],
    ]
)


def oracle(q: Any, k: Any, v: Any, segments: Segments, window: int | None, soft_cap: float | None, xp: Any) -> Any:
    """[b T h k] in float64, row by row and head by head; zero at padding."""
    ids, positions = (np.asarray(x) for x in segments)
    rows = []
    for row in range(q.shape[0]):
        visible = np.zeros((q.shape[1], q.shape[1]), bool)
        for query in range(q.shape[1]):
            reach = positions[row, query] + 1 if window is None else min(window, positions[row, query] + 1)
            visible[query, query + 1 - reach : query + 1] = ids[row, query] != 0
        heads = []
        for head in range(q.shape[2]):
            of = head * k.shape[2] // q.shape[2]
            scores = q[row, :, head] @ k[row, :, of].T / np.sqrt(q.shape[3])
            scores = scores if soft_cap is None else soft_cap * xp.tanh(scores / soft_cap)
            weights = xp.where(visible, xp.exp(scores), 0.0)
            heads.append(weights @ v[row, :, of] / xp.maximum(weights.sum(1, keepdims=True), 1e-300))
        rows.append(xp.stack(heads, axis=1))
    return xp.stack(rows)


def make_mesh(shape: dict[str, int]) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(shape.values())))]
    return jax.make_mesh(tuple(shape.values()), tuple(shape), (AxisType.Explicit,) * len(shape), devices=devices)


def values_and_gradients(attention: Any, segments: Segments, cotangent: Any, *arrays: Any) -> tuple[Any, ...]:
    """At the tokens that are no padding."""

    def objective(*arrays: Any) -> Any:
        o = attention(*arrays, segments) * (segments.ids != 0)[:, :, None, None]
        return jnp.sum(o * cotangent), o

    gradients, o = jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(*arrays)
    return o, *gradients


def operands(rng: np.random.Generator, b: int, t: int, h: int, g: int, k: int) -> list[np.ndarray]:
    """A cotangent of the output, and q, k, v."""
    return [rng.standard_normal((b, t, heads, k)).astype(np.float32) for heads in (h, h, g, g)]


def check(
    mesh: jax.sharding.Mesh,
    local: Any,
    arrays: list[np.ndarray],
    segments: Segments,
    window: int | None,
    soft_cap: float | None,
    over_time: PartitionSpec = OVER_TIME,
) -> None:
    """`local`, run by every device on its stretch, gives the oracle's values and gradients."""
    with jax.set_mesh(mesh):
        cut = jax.shard_map(local, in_specs=(over_time,) * 4, out_specs=over_time, check_vma=False)
        placed = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, over_time)), (segments, *arrays))
        got = jax.jit(partial(values_and_gradients, cut))(*placed)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in arrays]

        def whole(q: Any, k: Any, v: Any, segments: Segments) -> Any:
            return oracle(q, k, v, segments, window, soft_cap, jnp)

        want = values_and_gradients(whole, segments, *wide)
    assert want[0].dtype == np.float64
    for one, other, tolerance in zip(got, want, [FORWARD_TOLERANCE] + [GRADIENT_TOLERANCE] * 3, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other) + 1e-6


@pytest.mark.parametrize("window", [1, 5, "t", "t + 1", "2.5 t", "T - 1", "T", None])
@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_cut_sequence_equals_the_oracle(num: int, window: int | str | None, rng: np.random.Generator) -> None:
    t = T // num
    named = {"t": t, "t + 1": t + 1, "2.5 t": 5 * t // 2, "T - 1": T - 1, "T": T + 3}
    window = named[window] if isinstance(window, str) else window
    local = partial(attend, window=window, soft_cap=None, axis="context")
    check(make_mesh({"context": num}), local, operands(rng, 5, T, 3, 1, 6), DOCUMENTS, window, None)


@pytest.mark.parametrize(
    ("h", "g", "window", "soft_cap"),
    [
        (8, 8, None, None),  # heads divide by devices: exchanged for time
        (8, 2, None, 3.0),  # key-value heads are fewer than devices
        (4, 1, None, None),
        (12, 6, None, None),  # a key-value head on two devices
        (6, 2, None, 3.0),  # heads do not divide: keys are brought
        (5, 5, 9, None),
        (6, 2, 30, 3.0),
    ],
)
def test_heads_in_groups_and_soft_caps(
    h: int, g: int, window: int | None, soft_cap: float | None, rng: np.random.Generator
) -> None:
    local = partial(attend, window=window, soft_cap=soft_cap, axis="context")
    check(make_mesh({"context": 4}), local, operands(rng, 5, T, h, g, 6), DOCUMENTS, window, soft_cap)


@pytest.mark.parametrize("window", [7, None])
def test_time_over_two_mesh_axes_beside_a_third(window: int | None, rng: np.random.Generator) -> None:
    mesh, axis = make_mesh({"data": 2, "outer": 2, "inner": 2}), ("outer", "inner")
    rows = Segments(*(x[:4] for x in DOCUMENTS))
    local = partial(attend, window=window, soft_cap=None, axis=axis)
    for heads in (4, 3):
        arrays = operands(rng, 4, T, heads, 1, 6)
        check(mesh, local, arrays, rows, window, None, PartitionSpec("data", axis))


@pytest.mark.parametrize(("h", "window"), [(1, 300), (1, 700), (1, None), (2, None)])
def test_stretches_of_several_blocks_of_queries(h: int, window: int | None, rng: np.random.Generator) -> None:
    segments = packed([[(0, 5), (1, 800), (2, 1), (3, 384), (0, 10)]])
    local = partial(attend, window=window, soft_cap=None, axis="context")
    check(make_mesh({"context": 2}), local, operands(rng, 1, 1200, h, 1, 6), segments, window, None)


@pytest.mark.parametrize(("h", "window"), [(1, 70), (1, 255), (1, None), (2, None)])
def test_the_tpu_kernel_interpreted_equals_the_oracle(h: int, window: int | None, rng: np.random.Generator) -> None:
    segments = packed([[(0, 5), (1, 121), (2, 1), (3, 109), (0, 20)]])  # one begins at the border's last token
    kernel = partial(splash_attention, window=window, soft_cap=None, interpret=True)
    local = partial(attend_across, kernel, window=window, axis="context")
    check(make_mesh({"context": 2}), local, operands(rng, 1, 256, h, 1, 16), segments, window, None)


@pytest.mark.parametrize("before", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("reach", [0, 2, 3, 4, 5, 9, None])
def test_blocks_of_a_band_are_told_by_their_corners(before: int, reach: int | None) -> None:
    mask = Band((12, 24), (reach, 0), offset=before)
    distance = np.arange(12)[:, None] + before - np.arange(24)
    visible = (distance >= 0) & (distance <= (99 if reach is None else reach))
    for queries in (slice(i, i + 4) for i in range(0, 12, 4)):
        for keys in (slice(j, j + 4) for j in range(0, 24, 4)):
            got, want = mask[queries, keys], visible[queries, keys]
            assert (got.any(), got.all()) == (want.any(), want.all())
            if want.any() and not want.all():
                np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("window", [300, None])
def test_the_tpu_kernel_in_halves_equals_the_oracle(
    window: int | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridlm.mixers.attend.MAX_GRID_STEPS", 1)
    segments = packed([[(0, 5), (1, 500), (2, 1), (3, 684), (0, 10)]])
    kernel = partial(splash_attention, window=window, soft_cap=None, interpret=True)
    local = partial(attend_across, kernel, window=window, axis="context")
    check(make_mesh({"context": 2}), local, operands(rng, 1, 1200, 1, 1, 16), segments, window, None)


def compile_gradient(mesh: Any, t: int, h: int, window: int | None, dtype: Any = jnp.float32, k: int = 8) -> Any:
    """Of attention of h query heads and one key-value head over `t` tokens per device, compiled."""
    time = NamedSharding(mesh, OVER_TIME)
    num = mesh.shape["context"]
    q, kv = (jax.ShapeDtypeStruct((1, num * t, heads, k), dtype, sharding=time) for heads in (h, 1))
    row: Any = jax.ShapeDtypeStruct((1, num * t), jnp.int32, sharding=time)
    with jax.set_mesh(mesh):
        local = partial(attend, window=window, soft_cap=None, axis="context")
        cut: Any = jax.shard_map(local, in_specs=(OVER_TIME,) * 4, out_specs=OVER_TIME, check_vma=False)

        def gradient(q: Any, k: Any, v: Any, segments: Any) -> Any:
            return jax.grad(lambda *x: jnp.sum(cut(*x, segments).astype(jnp.float32) ** 2), argnums=(0, 1, 2))(q, k, v)

        segments: Any = Segments(row, row)
        return jax.jit(gradient).lower(q, kv, kv, segments).compile()


def collectives(compiled: Any) -> list[tuple[str, str, str]]:
    """(operation, dtype, shape) of each, where an operation has several operands the first's."""
    pattern = r"= \(?(\w+)\[([\d,]*)\].*? (all-[\w-]+?|collective-permute|reduce-scatter)(?:-start)?\("
    return sorted((name, dtype, shape) for dtype, shape, name in re.findall(pattern, compiled.as_text()))


@pytest.mark.parametrize(
    ("window", "hops"), [(1, []), (5, [4]), (16, [15]), (17, [16]), (40, [16, 16, 7]), (63, [16, 16, 16])]
)
def test_a_window_moves_the_keys_it_reaches_from_neighbour_to_neighbour(window: int, hops: list[int]) -> None:
    moved = collectives(compile_gradient(make_mesh({"context": 4}), 16, 3, window))
    keys_and_values = [("collective-permute", "f32", f"1,{n},1,8") for n in hops] * 2
    ids_and_positions = [("collective-permute", "s32", f"1,{n}") for n in hops] * 2
    assert moved == sorted(2 * keys_and_values + ids_and_positions)  # there, and their gradients back


def test_without_a_window_heads_are_exchanged_for_time_where_they_divide() -> None:
    moved = collectives(compile_gradient(make_mesh({"context": 4}), 16, 4, None))
    there_and_back = [("all-to-all", "f32", "1,16,1,8")] * 8  # q, k, v and o: a device's token and head at a time
    assert moved == [("all-gather", "s32", "1,64")] * 2 + there_and_back
    keys = {(name, dtype) for name, dtype, _ in collectives(compile_gradient(make_mesh({"context": 4}), 16, 3, None))}
    assert keys == {("collective-permute", "f32"), ("collective-permute", "s32")}


@pytest.mark.parametrize(("h", "window"), [(1, 300), (1, None), (4, None)])
def test_memory_grows_linearly(h: int, window: int | None) -> None:
    mesh = make_mesh({"context": 4})
    short, long = (compile_gradient(mesh, t, h, window).memory_analysis().temp_size_in_bytes for t in (512, 2048))
    assert long < 4.5 * short


@pytest.mark.slow
@pytest.mark.parametrize(("h", "window"), [(4, 300), (4, None), (3, None)])
def test_the_tpu_kernel_compiles(h: int, window: int | None) -> None:
    devices = absent_tpus("v5e:2x2")
    mesh = jax.make_mesh((4,), ("context",), (AxisType.Explicit,), devices=devices)
    compiled = compile_gradient(mesh, 1024, h, window, jnp.bfloat16, 128)
    assert "splash_mha_fwd" in compiled.as_text() and "splash_mha_dkv" in compiled.as_text()
    kinds = {name for name, *_ in collectives(compiled)}
    assert kinds == ({"all-gather", "all-to-all"} if (h, window) == (4, None) else {"collective-permute"})
