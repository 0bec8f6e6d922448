"""Which steps are tried, in which order, and how they are ranked."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.config_io import load_config, override
from hybridlm.plan import advice, search
from hybridlm.plan.advice import Change, families, smallest_change
from hybridlm.plan.chips import HARDWARE
from hybridlm.plan.topology import Topology, topology

GRIFFIN = load_config("griffin_1b")


def test_meshes_multiply_to_the_devices_and_leave_the_expert_axis_to_models_with_experts() -> None:
    for name in ("v5e:4x4", "v5p:2x2x2*2"):
        found = search.meshes(GRIFFIN, topology(name))
        assert len({*found}) == len(found) > 10
        for mesh in found:
            sizes = mesh.data, mesh.fsdp, mesh.expert, mesh.context, mesh.tensor
            assert math.prod(sizes) == topology(name).num_devices // topology(name).num_slices
        assert {mesh.expert for mesh in found} == {1}
    assert {mesh.expert for mesh in search.meshes(load_config("griffin_moe_tiny"), topology("v5e:2x2"))} > {1}


def test_the_flags_of_a_variant_make_it() -> None:
    for base in (GRIFFIN, override(GRIFFIN, ["sharding.auto=true"])):
        for config, flags in list(search.variants(base, topology("v5e:2x2")))[::37]:
            assert override(base, [flag.removeprefix("--") for flag in flags]) == config
            assert not config.sharding.auto


def test_what_shards_more_holds_less_and_what_recomputes_more_is_slower() -> None:
    where = topology("v5e:4x4")
    sizes = search.sizes_of(GRIFFIN)

    def of(*assignments: str) -> search.Candidate:
        return search.estimated(override(GRIFFIN, assignments), assignments, where, HARDWARE["v5e"], sizes)

    data, fsdp = (
        of("sharding.mesh.data=16", "sharding.mesh.fsdp=1"),
        of("sharding.mesh.data=1", "sharding.mesh.fsdp=16"),
    )
    assert fsdp.bytes < data.bytes
    none, full = of("sharding.mesh.fsdp=16", "model.remat=none"), of("sharding.mesh.fsdp=16", "model.remat=full")
    assert full.tokens_per_second < none.tokens_per_second and full.bytes < none.bytes


@pytest.fixture
def rates_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up = replace(HARDWARE["h200"], hbm_bytes=None)
    monkeypatch.setitem(HARDWARE, "cpu", made_up)
    monkeypatch.setattr(Topology, "memory", 10**9)


@pytest.mark.usefixtures("rates_of_a_cpu")
def test_only_steps_that_exist_are_promising(tiny_config: Config) -> None:
    found = list(search.promising(tiny_config, topology("cpu:8"), HARDWARE["cpu"], 6))
    assert len(found) == 6
    chosen = override(tiny_config, ["sharding.auto=true"])
    assert [c.config for c in search.promising(chosen, topology("cpu:8"), HARDWARE["cpu"], 6)] == [
        c.config for c in found
    ]
    for candidate in found:
        mesh = candidate.config.sharding.mesh
        assert mesh.tensor in (1, 2)  # of two heads
        rows = candidate.config.train.batch_size // candidate.config.train.num_microbatches
        assert rows % (mesh.data * mesh.fsdp) == 0


@pytest.mark.usefixtures("rates_of_a_cpu")
def test_steps_that_fit_come_first_and_then_the_fastest(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: Iterator[tuple[bool, float]] = iter([(True, 5.0), (False, 9.0), (True, 7.0)])

    def made(_: Any) -> Any:
        fits, rate = next(rates)
        return SimpleNamespace(fits=fits, tokens_per_second=rate)

    monkeypatch.setattr(search, "compile_step", lambda *_: None)
    monkeypatch.setattr(search, "make_report", made)
    said: list[str] = []
    ranked = search.search(tiny_config, topology("cpu:8"), compiles=3, say=said.append)
    assert [found.report.tokens_per_second for found in ranked] == [7.0, 5.0, 9.0]
    assert len(said) == 3 and "does not fit" in said[1]


def test_nothing_is_ranked_without_rates(tiny_config: Config) -> None:
    with pytest.raises(ConfigError, match="--search: the rates of cpu are not known"):
        search.search(tiny_config, topology("cpu:8"), compiles=1, say=print)


def needing(bytes_of: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that need these bytes of 100 with a change, others 1000; returns the changes that were compiled."""
    compiled: list[str] = []

    def step(config: Config, where: Any, change: Change, say: Any) -> Any:
        compiled.append(change.flags)
        needed = bytes_of.get(change.flags, 1000)
        return SimpleNamespace(fits=needed <= 100, needed_bytes=needed)

    monkeypatch.setattr(advice, "_with", step)
    monkeypatch.setattr(advice, "_is_possible", lambda *_: True)
    return compiled


MESH = {"slices": 1, "data": 4, "fsdp": 1, "expert": 1, "context": 4, "tensor": 1}
REFUSED: Any = SimpleNamespace(available_bytes=100, mesh=MESH)


def test_the_weakest_change_that_fits_is_the_smallest(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(GRIFFIN, ["model.remat=none"])
    compiled = needing({"--model.remat=full": 60, "--model.remat=block_outputs": 90}, monkeypatch)
    found = smallest_change(config, topology("v5e:4x4"), REFUSED, print)
    assert found is not None and found[0].flags == "--model.remat=block_outputs"
    assert compiled == ["--model.remat=full", "--model.remat=dots", "--model.remat=block_outputs"]


def test_of_a_kind_of_change_whose_strongest_does_not_fit_no_other_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    config = override(GRIFFIN, ["model.remat=none"])
    compiled = needing({"--topology v5e:4x8": 80}, monkeypatch)
    found = smallest_change(config, topology("v5e:4x4"), REFUSED, print)
    assert found is not None and found[0].flags == "--topology v5e:4x8"
    every = [change for family in families(config, topology("v5e:4x4"), MESH) for change in family]
    assert len(compiled) < len(every) / 2


def test_where_nothing_fits_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    needing({}, monkeypatch)
    assert smallest_change(GRIFFIN, topology("v5e:4x4"), REFUSED, print) is None


def test_changes_that_change_the_run_come_after_those_that_do_not() -> None:
    flags = [change.flags for family in families(GRIFFIN, topology("v5e:4x4"), MESH) for change in family]
    kinds = [("batch_size" in f, "--topology" in f) for f in flags]
    assert kinds == sorted(kinds, key=lambda kind: (kind[1], kind[0]))


def test_a_mesh_that_was_chosen_is_named_where_fsdp_takes_the_place_of_data() -> None:
    where = topology("v5e:4x4")
    small = override(GRIFFIN, ["train.batch_size=4"])
    chosen = override(small, ["sharding.auto=true"])
    named = override(small, ["sharding.mesh.data=4", "sharding.mesh.fsdp=1", "sharding.mesh.context=4"])
    found = {change.flags for family in families(chosen, where, MESH) for change in family}
    fsdp = "--sharding.auto=False --sharding.mesh.context=4 --sharding.mesh.fsdp=-1 --sharding.mesh.data=1"
    assert fsdp in found
    assert "--sharding.mesh.fsdp=4 --sharding.mesh.data=1" in {
        change.flags for family in families(named, where, MESH) for change in family
    }
    changed = override(chosen, [flag.removeprefix("--") for flag in fsdp.split()])
    shape = dict(where.abstract_mesh(where.mesh_of(changed)).shape)
    assert shape == MESH | {"data": 1, "fsdp": 4}
