"""The mesh that `sharding.auto` chooses, for models and devices of all sizes."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import pytest

from hybridlm.config import Config, Mesh, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.config_io import list_recipes, load_config
from hybridlm.data.packing import FIELDS
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.plan.topology import Topology, topology
from hybridlm.sharding import check_batch, spec
from hybridlm.train.mesh_choice import chosen_mesh, run_mesh, state_bytes
from hybridlm.train.step import init_state, make_train_step

GIB = 2**30
EVERY = tuple(name for name, _, _ in list_recipes())
QUICK = ("griffin_tiny", "transformer_1b", "mamba2_1b", "griffin_memory_tiny", "switch_style", "qwen3_next_80b_a3b")
"""One of each kind of layer, more or less: the others trace in `make slow`."""


def automatic(name: str, *, batch_size: int, seq_len: int = 2048, mesh: Mesh | None = None) -> Config:
    base = load_config(name)
    return replace(
        base,
        data=replace(base.data, seq_len=seq_len),
        train=replace(base.train, batch_size=batch_size),
        sharding=Sharding(mesh=mesh or Mesh(), auto=True),
    )


def sizes(mesh: Mesh) -> tuple[int, ...]:
    return mesh.slices, mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor


def test_without_auto_the_mesh_is_the_configs_own() -> None:
    config = load_config("griffin_7b")
    assert chosen_mesh(config, 64, 1, GIB) is config.sharding.mesh


def test_a_small_model_is_copied() -> None:
    assert sizes(chosen_mesh(automatic("griffin_tiny", batch_size=64), 8, 1, 16 * GIB)) == (1, 8, 1, 1, 1, 1)


@pytest.mark.parametrize("memory", [16, 32, 95])
def test_parameters_are_spread_as_far_as_memory_asks(memory: int) -> None:
    config = automatic("griffin_7b", batch_size=256)
    fsdp = chosen_mesh(config, 256, 1, memory * GIB).fsdp
    state = state_bytes(config)
    assert state / fsdp <= memory * GIB / 4 < state / (fsdp / 2)


def test_time_is_cut_where_the_batch_is_small() -> None:
    config = automatic("gated_deltanet_h1_1b", batch_size=16, seq_len=131_072)
    assert chosen_mesh(config, 64, 1, 32 * GIB).context == 4


def test_experts_have_devices_of_their_own_and_slices_are_kept() -> None:
    mesh = chosen_mesh(automatic("switch_style", batch_size=1024), 256, 2, 95 * GIB)
    assert (mesh.slices, mesh.expert) == (2, 128)


def test_experts_are_spread_no_further_than_the_vocabulary_divides() -> None:
    config = automatic("qwen3_next_80b_a3b", batch_size=1024)
    assert config.model.vocab_size % 128 == 0 != config.model.vocab_size % 256
    assert sizes(chosen_mesh(config, 1024, 2, 95 * GIB)) == (2, 4, 1, 128, 1, 1)


@pytest.mark.parametrize(
    ("mesh", "chosen"),
    [
        (Mesh(tensor=4, fsdp=8), (1, 2, 8, 1, 1, 4)),
        (Mesh(data=4), (1, 4, 16, 1, 1, 1)),
        (Mesh(data=1, fsdp=-1, context=2), (1, 2, 16, 1, 2, 1)),
        (Mesh(data=1, expert=2, tensor=-1), (1, 2, 16, 2, 1, 1)),
        (Mesh(slices=4, context=4), (4, 1, 4, 1, 4, 1)),
    ],
)
def test_a_size_that_is_set_stays(mesh: Mesh, chosen: tuple[int, ...]) -> None:
    assert sizes(chosen_mesh(automatic("griffin_7b", batch_size=64, mesh=mesh), 64, 1, 16 * GIB)) == chosen


@pytest.mark.parametrize(
    ("batch_size", "mesh", "message"),
    [
        (3, Mesh(), "no mesh of 8 devices, .* divides 3 sequences per microbatch, of 2049 tokens, .* multiple of 8,"),
        (8, Mesh(fsdp=16), "no mesh of 8 devices, with the sizes that sharding.mesh sets,"),
        (8, Mesh(context=2), "no mesh of 8 devices, .* of 2049 tokens"),
    ],
)
def test_where_nothing_divides_is_an_error(batch_size: int, mesh: Mesh, message: str) -> None:
    config = automatic("griffin_tiny", batch_size=batch_size, seq_len=2049, mesh=mesh)
    with pytest.raises(ConfigError, match=f"^sharding.auto: {message}"):
        chosen_mesh(config, 8, 1, None)


def test_a_set_size_that_does_not_divide_the_devices_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^sharding.mesh: .*tensor=3 needs 3 devices, which must divide the 64"):
        where = topology("v5e:8x8")
        where.abstract_mesh(where.mesh_of(automatic("griffin_7b", batch_size=64, mesh=Mesh(tensor=3))))


def test_the_mesh_of_a_run_has_all_devices() -> None:
    mesh = run_mesh(automatic("griffin_tiny", batch_size=2, seq_len=64))
    assert mesh.size == jax.device_count()
    assert mesh.shape["context"] == jax.device_count() // 2


@dataclass(frozen=True)
class Traced:
    """A run on the mesh that it chooses for devices that are not there."""

    config: Config
    where: Topology

    @property
    def mesh(self) -> Any:
        return self.where.abstract_mesh(self.where.mesh_of(self.config))

    def state(self) -> Any:
        """Refused where an axis of the model does not divide."""
        optimizer, _ = make_optimizer(self.config.optimizer, self.config.train.steps)
        with jax.sharding.use_abstract_mesh(self.mesh):
            init, _ = build(self.config.model, self.config.kernels)
            train = self.config.train
            return jax.eval_shape(lambda: init_state(init, optimizer, train.seed, self.config.optimizer.tables))

    def step(self) -> Any:
        """Refused where a layout is ambiguous, too."""
        config, mesh = self.config, self.mesh
        check_batch(config, mesh)
        optimizer, schedule = make_optimizer(config.optimizer, config.train.steps)
        with jax.sharding.use_abstract_mesh(mesh):
            _, bind = build(config.model, config.kernels)
            rows = jax.NamedSharding(mesh, spec("sequences", "time"))
            shape = config.train.batch_size, config.data.seq_len
            batch = {field: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for field, dtype in FIELDS.items()}
            step = make_train_step(bind, optimizer, schedule, config.train, config.optimizer.tables)
            return step.trace(self.state(), batch)


@pytest.mark.parametrize("recipe", EVERY)
def test_the_mesh_cuts_every_recipe(recipe: str) -> None:
    run = Traced(automatic(recipe, batch_size=1024), topology("v5p:8x8x8*2"))
    check_batch(run.config, run.mesh)
    assert run.state()


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[] if r in QUICK else pytest.mark.slow) for r in EVERY])
def test_every_recipe_traces_on_its_mesh(recipe: str) -> None:
    assert Traced(automatic(recipe, batch_size=64), topology("v5e:8x8")).step()


@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[] if r == QUICK[0] else pytest.mark.slow) for r in EVERY])
def test_every_recipe_traces_where_time_is_cut(recipe: str) -> None:
    run = Traced(automatic(recipe, batch_size=16), topology("v5p:4x4x4"))
    assert run.mesh.shape["context"] == 4
    assert run.step()
