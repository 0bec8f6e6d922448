"""Checkpoints do not depend on how a config splits its layers, nor on the mesh."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm.config import RGLRU, AdamW, Attention, Block, Checkpoint, GeGLU, Kernels, Mesh, Model
from hybridlm.model import build
from hybridlm.model.by_layer import layers_of
from hybridlm.optim import make_optimizer
from hybridlm.sharding import make_mesh
from hybridlm.train import integrity, layout
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.record import read_parts
from hybridlm.train.step import TrainState, init_state

A = Block(mixer=RGLRU(width=16, num_heads=2), ffn=GeGLU(hidden=16))
B = Block(mixer=Attention(num_heads=2, num_kv_heads=2), ffn=None)
MODEL = Model(vocab_size=64, width=16, num_layers=7, prologue=(A,), pattern=(A, B), epilogue=(B, A))
SPLITS = {
    "the same": MODEL,
    "pattern twice": replace(MODEL, pattern=(A, B, A, B)),
    "one repeat, and a tail": replace(MODEL, prologue=(A, A, B), pattern=(A, B, B), epilogue=()),
    "not scanned": replace(MODEL, prologue=(A, A, B, A, B, B, A), epilogue=()),
    "no prologue": replace(MODEL, prologue=(), pattern=(A, A, B, A, B, B, A), epilogue=()),
}


def make(model: Model) -> Any:
    init, _ = build(model, Kernels())
    optimizer, _ = make_optimizer(AdamW(), 1000)
    return partial(init_state, init, optimizer, 3)


def opened(directory: Path, model: Model) -> Checkpoints:
    return Checkpoints(directory, model, Checkpoint())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """A checkpoint of `MODEL` with numbers in its moments too, and the state on the host."""
    directory = tmp_path_factory.mktemp("layouts")
    mesh = make_mesh(Mesh(fsdp=4))
    with jax.set_mesh(mesh), opened(directory, MODEL) as checkpoints:
        state = jax.jit(make(MODEL))()
        draw = np.random.default_rng(0).standard_normal
        state = jax.tree.map(lambda x: jax.device_put(draw(x.shape).astype(x.dtype), x.sharding), state)
        checkpoints.save(5, state, {"next": 5}, {})
    return directory, jax.device_get(state)


@pytest.mark.parametrize("split", SPLITS)
def test_another_split_and_mesh_restore_the_same_layers(split: str, saved: tuple[Path, TrainState]) -> None:
    directory, expected = saved
    model = SPLITS[split]
    assert model.blocks() == MODEL.blocks()
    mesh = make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    with jax.set_mesh(mesh), opened(directory, model) as checkpoints:
        abstract = abstract_state(make(model), mesh)
        state, data = checkpoints.restore(abstract)
        params = checkpoints.restore_params(abstract.params)
    assert data == {"next": 5}
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    for tree, of_expected in ((state.params, expected.params), (params, expected.params)):
        assert_same(tree, model, of_expected)
    # The moments of AdamW.
    (moments, of_expected) = (x.opt_state[0].inner_state[1][0] for x in (state, expected))
    assert_same(moments.mu, model, of_expected.mu)
    assert_same(moments.nu, model, of_expected.nu)
    assert int(state.step) == int(expected.step)


def assert_same(params: Any, model: Model, expected: Any) -> None:
    """By the layers that `by_layer` takes apart."""
    for name in ("embedding", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params[name], expected[name])
    jax.tree.map(np.testing.assert_array_equal, layers_of(params["stack"], model), layers_of(expected["stack"], MODEL))


def test_names_count_layers_from_the_first(saved: tuple[Path, TrainState]) -> None:
    names = set(layout.flat_abstract(saved[1].params, MODEL))
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {str(i) for i in range(7)}
    assert not any("repeats" in name or "tail" in name for name in names)
    assert len(names) == sum(len(leaf.names) for leaf in layout.leaves_of(saved[1].params, MODEL))


def test_fingerprints_are_those_of_the_arrays_that_are_saved(saved: tuple[Path, TrainState]) -> None:
    mesh = make_mesh(Mesh(fsdp=4))
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved[1].params, layout_of(mesh))
        one_by_one = layout.fingerprints({"x": layout.flat(params, MODEL)}, MODEL)
        assert {f"x.{name}": text for name, text in layout.fingerprints(params, MODEL).items()} == one_by_one


def layout_of(mesh: jax.sharding.Mesh) -> Any:
    return abstract_state(make(MODEL), mesh).params


def test_copies_share_the_saving_of_large_arrays(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(layout, "SMALLEST_PART", 64)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    x = rng.standard_normal((2, 16, 12)).astype(np.float32)
    with jax.set_mesh(mesh):
        tree = {"stack": {"repeats": {0: {"w": jax.device_put(x, jax.P(None, "fsdp", None))}}}}
        arrays = layout.flat(tree, MODEL)
        parts = {str(index) for index in arrays["layers.1.w"].sharding.devices_indices_map((16, 12)).values()}
        assert len(parts) == 8
        assert sorted(arrays) == ["layers.1.w", "layers.3.w"]
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        back = layout.stacked(arrays, abstract, MODEL)
    np.testing.assert_array_equal(back["stack"]["repeats"][0]["w"], x)


def test_arrays_of_many_devices_are_verified_in_pieces(
    saved: tuple[Path, TrainState], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integrity, "PIECE_BYTES", 300)
    directory, expected = saved
    pieces = list(integrity.stored_pieces(directory / "5" / "state", "params.embedding"))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate([piece for _, piece in pieces]), expected.params["embedding"])
    parts, _ = read_parts(directory / "5")
    arrays = parts["fingerprints"]["arrays"]
    assert list(integrity.damaged_arrays(directory / "5" / "state", arrays, sorted(arrays))) == []


def test_layers_in_host_memory_are_saved_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on accelerators. A CPU's devices know that memory as well, but need no copy there."""
    monkeypatch.setattr(layout, "_host_memory", lambda device: "pinned_host")
    mesh = make_mesh(Mesh(fsdp=4))
    draw = np.random.default_rng(0).standard_normal
    with jax.set_mesh(mesh), opened(tmp_path, MODEL) as checkpoints:
        abstract = abstract_state(make(MODEL), mesh)
        state = jax.tree.map(lambda x: jax.device_put(draw(x.shape).astype(x.dtype), x.sharding), abstract)
        kinds = {x.sharding.memory_kind for x in layout.flat(state.params, MODEL).values()}
        assert kinds == {"pinned_host", "device"}
        checkpoints.save(5, state, {}, {})
        restored, _ = checkpoints.restore(abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(restored)} == {"device"}
