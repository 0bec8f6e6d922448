"""The step that is planned is the step that is trained."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm.config import Config, Mesh, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import load_corpus
from hybridlm.plan.compile import compile_step, interruptible
from hybridlm.plan.topology import COMPILERS, topology
from hybridlm.sharding import make_mesh
from hybridlm.train import loop
from hybridlm.train.mesh_choice import run_mesh
from hybridlm.train.program import step_program


class Stopped(Exception):
    """Training got to where it compiles."""


@pytest.fixture
def sharded(tiny_config: Config) -> Config:
    return replace(tiny_config, sharding=Sharding(mesh=Mesh(data=2, fsdp=2, tensor=2)))


def test_train_and_plan_lower_the_same_program(
    sharded: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = []

    def stop(given: Any, *_: Any) -> None:
        lowered.append(given.as_text())
        raise Stopped

    monkeypatch.setattr(loop, "compile_step", stop)
    with pytest.raises(Stopped):
        loop.train(sharded, tmp_path / "run")
    planned = compile_step(sharded, topology("cpu:8"))
    assert planned.lowered.as_text() == lowered[0]
    assert planned.dump.compiled is not None and planned.compile_seconds > 0
    assert "all-gather" in planned.dump.hlo


def test_the_abstract_batch_is_like_a_real_one(sharded: Config) -> None:
    mesh = make_mesh(sharded.sharding.mesh)
    with jax.set_mesh(mesh):
        batch = step_program(sharded, mesh).batch
    window = load_corpus(sharded.data).validation[0]
    assert {name: (x.shape[1:], x.dtype) for name, x in batch.items()} == {
        name: (x.shape, x.dtype) for name, x in window.items()
    }
    assert {x.shape[0] for x in batch.values()} == {sharded.train.batch_size}


def test_a_step_compiles_on_the_mesh_that_auto_chooses(tiny_config: Config) -> None:
    config = replace(tiny_config, sharding=Sharding(auto=True), train=replace(tiny_config.train, batch_size=2))
    where = topology("cpu:8")
    mesh = compile_step(config, where).mesh
    assert mesh.shape == where.abstract_mesh(where.mesh_of(config)).shape == run_mesh(config).shape
    assert (mesh.shape["data"], mesh.shape["context"]) == (2, 4)


def test_errors_come_out_of_what_can_be_interrupted() -> None:
    def fail() -> None:
        raise ConfigError("model", ": is wrong")

    with pytest.raises(ConfigError, match="model: is wrong"):
        interruptible(fail)
    assert interruptible(lambda: 3) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1*2"])
def test_a_step_compiles_for_absent_tpus(tiny_config: Config, name: str) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    config = replace(tiny_config, sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)))
    compiled = compile_step(config, topology(name))
    assert compiled.dump.compiled is not None
    assert compiled.mesh.shape["fsdp"] == 4 and compiled.mesh.shape["slices"] == topology(name).num_slices


@pytest.mark.gpu_aot
def test_a_step_compiles_for_absent_gpus(tiny_config: Config) -> None:
    if not any(map(importlib.util.find_spec, COMPILERS["cuda"][0])):
        pytest.skip("needs JAX's CUDA plugin: pip install 'hybridlm[cuda]'")
    config = replace(tiny_config, sharding=Sharding(mesh=Mesh(data=1, fsdp=-1)))
    compiled = compile_step(config, topology("h200:8"))
    assert compiled.dump.compiled is not None and compiled.mesh.size == 8
