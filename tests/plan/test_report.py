"""What a plan says of a step."""

import json
from dataclasses import replace

import pytest

from hybridlm.config import Config, Mesh, Sharding
from hybridlm.flops import training_flops
from hybridlm.plan.compile import CompiledStep, compile_step
from hybridlm.plan.report import Report, make_report
from hybridlm.plan.text import describe, duration, table, unit_of, verdict
from hybridlm.plan.topology import Topology, topology
from hybridlm.train.capacity import bytes_per_device


@pytest.fixture(scope="module")
def compiled(tiny_config: Config) -> CompiledStep:
    return compile_step(replace(tiny_config, sharding=Sharding(mesh=Mesh(data=2, fsdp=2))), topology("cpu:4"))


@pytest.fixture(scope="module")
def report(compiled: CompiledStep) -> Report:
    return make_report(compiled)


def test_the_kinds_of_memory_add_up(compiled: CompiledStep, report: Report) -> None:
    held = report.memory
    parts = held.parameters, held.optimizer, held.batch, held.activations, held.temporaries, held.code
    assert sum(parts) == held.total == report.needed_bytes
    assert held.parameters + held.optimizer == bytes_per_device(compiled.step.state)
    assert report.fits and report.available_bytes is not None


def test_what_needs_more_than_there_is_does_not_fit(compiled: CompiledStep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Topology, "memory", 1000)
    found = make_report(compiled)
    assert not found.fits
    assert verdict(found).startswith("does not fit: ")


def test_flops_are_those_of_the_model_and_by_part(compiled: CompiledStep, report: Report) -> None:
    config = compiled.config
    assert report.model_flops == training_flops(config.model, config.data.seq_len) * report.tokens
    assert {"mixer/RGLRU", "mixer/Attention", "ffn/GeGLU", "head", "optimizer"} <= set(report.costs)
    assert report.estimate is None and report.tokens_per_second is None  # nobody knows the rates of a CPU


def test_the_json_holds_what_is_derived_too(report: Report) -> None:
    found = json.loads(json.dumps(report.to_json()))
    assert found["tokens"] == report.tokens and found["mesh"]["fsdp"] == 2
    assert {c["kind"] for c in found["collectives"]} == {c.kind for c in report.collectives}


def test_the_text_names_all_parts(report: Report) -> None:
    text = describe("tiny", report)
    assert text.startswith("tiny on cpu:4 fits: ")
    assert "mesh data 2, fsdp 2" in text and "8 x 32 = 256 tokens" in text
    for part in (*report.costs, *{c.kind for c in report.collectives}, "activations", "the rates of cpu are not known"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 160


def test_numbers_are_written_in_units_that_fit_them() -> None:
    assert [duration(s) for s in (12.34, 0.0123, 4e-5)] == ["12.3 s", "12.3 ms", "40 us"]
    assert unit_of(5e10) == (1e9, "G") and unit_of(3) == (1.0, "") and unit_of(2**31, "KMGT", 1024) == (2.0**30, "G")
    assert table([("a", "1"), ("bcd", "23")], 1) == ["  a     1", "  bcd  23"]
