"""The compiled step of every recipe exchanges what it has to, holds what it has to, and does not grow with its depth.

Compiled for eight devices of a CPU, with two repeats of the pattern. Batch and time are multiples of 19 and 17, as no
size of a recipe is: an array with an axis of time holds tokens, one with an axis of the batch alone holds states.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import pytest
from hybridlm_kernels.bench.hlo import Program

from hybridlm.config import Config, Dropless, Mesh, MoE
from hybridlm.config_io import list_recipes, load_config
from hybridlm.plan.collectives import KINDS, collectives
from hybridlm.plan.costs import scope_of
from hybridlm.plan.device_groups import Places
from hybridlm.sharding import make_mesh
from hybridlm.train.capacity import bytes_per_device
from hybridlm.train.program import StepProgram, compile_step, step_program

ROWS, TIME = 19, 17
NUM_SEQUENCES = 8 * ROWS
LENGTH = 64 * TIME  # whole chunks of 64, the largest of the scans
TENSOR = Mesh(data=1, fsdp=4, tensor=2)
CONTEXT = Mesh(data=1, fsdp=2, context=4)
EXPERT = Mesh(data=1, fsdp=2, expert=4)


def has_experts(config: Config) -> bool:
    return any(isinstance(block.ffn, MoE) for block in config.model.blocks())


QUICK = (
    ("griffin_1b", TENSOR),
    ("transformer_1b", TENSOR),
    ("mamba2_1b", TENSOR),
    ("gla_1b", TENSOR),
    ("gated_deltanet_1b", TENSOR),
    ("kimi_linear_style_tiny", TENSOR),
    ("deltanet_neg_tiny", TENSOR),
    ("griffin_memory_tiny", TENSOR),
    ("peer_1b", TENSOR),
    ("griffin_1b", CONTEXT),
    ("gated_deltanet_h2_1b", CONTEXT),
    ("switch_style", EXPERT),
)
"""Every kind of layer is in one of these; the recipes that are left have them in other sizes and other company."""
EVERY = tuple((name, EXPERT if has_experts(config) else TENSOR) for name, _, config in list_recipes())
MOVING = ("all-gather", "all-to-all", "ragged-all-to-all", "collective-permute")
"""Collectives that give a device what another one has; reductions add up what each has computed."""
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Moved:
    """An array that a collective sends, `runs` times in a step."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    dims: tuple[int, ...]
    bytes: int
    """After an all-gather, before any other."""
    runs: int
    scope: str

    @property
    def holds(self) -> str:
        if any(n % TIME == 0 for n in self.dims):
            return "tokens"
        return "states" if any(n % ROWS == 0 for n in self.dims) else "parameters"

    def __str__(self) -> str:
        return f"{self.kind} along {'+'.join(self.axes)}, {self.holds}"


@dataclass(frozen=True)
class Step:
    """What is asked of a compiled step."""

    moved: tuple[Moved, ...]
    traced_lines: int
    """Of StableHLO."""
    instructions: int
    argument_bytes: int
    temporary_bytes: int


def mesh_text(mesh: Mesh) -> str:
    return " ".join(
        f"{axis}={getattr(mesh, axis)}" for axis in ("fsdp", "expert", "context", "tensor") if getattr(mesh, axis) > 1
    )


def cases() -> Iterator[Any]:
    for name, mesh in dict.fromkeys(QUICK + EVERY):
        text = f"{name} {mesh_text(mesh)}"
        marks = [pytest.mark.xdist_group(text), *([] if (name, mesh) in QUICK else [pytest.mark.slow])]
        yield pytest.param(name, mesh, id=text, marks=marks)


every_case = pytest.mark.parametrize(("recipe", "mesh"), list(cases()))


def shrunk(recipe: str, mesh: Mesh, repeats: int = 2) -> Config:
    """The recipe with its widths, `repeats` of its pattern, and no more than two blocks before it."""
    config = load_config(recipe)
    model = config.model
    prologue = model.prologue[-2:]
    tail = (model.num_layers - len(model.prologue) - len(model.epilogue)) % len(model.pattern)
    layers = len(prologue) + repeats * len(model.pattern) + tail + len(model.epilogue)
    model = replace(model, prologue=prologue, num_layers=layers)
    # Time of a device has whole chunks as well.
    length = LENGTH * mesh.context
    return replace(
        config,
        model=replace(model, pattern=tuple(map(without_ragged_exchange, model.pattern))),
        data=replace(config.data, seq_len=length),
        train=replace(config.train, batch_size=NUM_SEQUENCES, num_microbatches=1),
        sharding=replace(config.sharding, mesh=mesh),
    )


def without_ragged_exchange(block: Any) -> Any:
    """XLA has no ragged exchange on CPU, where an all-gather stands for it."""
    is_ragged = isinstance(block.ffn, MoE) and isinstance(block.ffn.dispatch, Dropless)
    return (
        replace(block, ffn=replace(block.ffn, dispatch=replace(block.ffn.dispatch, exchange="padded")))
        if is_ragged
        else block
    )


def program_of(config: Config) -> tuple[StepProgram, jax.stages.Lowered]:
    mesh = make_mesh(config.sharding.mesh)
    with jax.set_mesh(mesh):
        step = step_program(config, mesh)
        return step, step.lower()


def compiled(config: Config) -> Step:
    step, lowered = program_of(config)
    made = compile_step(lowered, step.mesh, config)
    program = Program(str(made.as_text()))
    held: Any = made.memory_analysis()
    found = tuple(arrays_moved(program, step.mesh))
    total = sum(c.bytes * c.runs for c in collectives(program, step.mesh))
    assert sum(moved.bytes * moved.runs for moved in found) == total, "hybridlm.plan counts other bytes"
    instructions = sum(len(body) for body in program.computations.values())
    return Step(found, num_lines(lowered), instructions, held.argument_size_in_bytes, held.temp_size_in_bytes)


@functools.cache
def step_of(recipe: str, mesh: Mesh) -> Step:
    return compiled(shrunk(recipe, mesh))


def arrays_moved(program: Program, mesh: jax.sharding.Mesh) -> Iterator[Moved]:
    """Each array of each collective: XLA merges those of one kind, more or fewer of them from version to version."""
    places = Places(program, mesh)
    for computation, i, runs in program.scheduled():
        kind = i.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        devices, axes = places.devices_and_axes(i)
        for name in i.operands if axes else ():
            found = _ARRAY.search(program.computations[computation][name].result)
            assert found, name
            dims = tuple(int(n) for n in found.group(3).split(",") if n)
            size = math.prod(dims) * int(found.group(2) or 8) // 8 * (devices if kind == "all-gather" else 1)
            yield Moved(kind, axes, found.group(1), dims, size, runs, scope_of(i.op_name) or "")


@every_case
def test_collectives_are_those_of_the_budget(recipe: str, mesh: Mesh, budgets: Any, cpu_compiler: str) -> None:
    total: dict[str, dict[str, int]] = defaultdict(lambda: {"arrays": 0, "bytes": 0})
    for moved in step_of(recipe, mesh).moved:
        total[str(moved)]["arrays"] += moved.runs
        total[str(moved)]["bytes"] += moved.runs * moved.bytes
    counted = {key: f"{of['arrays']} arrays, {of['bytes']:,} bytes" for key, of in sorted(total.items())}
    budgets.check(f"{recipe} {mesh_text(mesh)}", cpu_compiler, collectives=counted)


@every_case
def test_memory_is_within_the_budget(recipe: str, mesh: Mesh, budgets: Any, cpu_compiler: str) -> None:
    step = step_of(recipe, mesh)
    budgets.check(
        f"{recipe} {mesh_text(mesh)}",
        cpu_compiler,
        argument_bytes=step.argument_bytes,
        temporary_bytes=step.temporary_bytes,
    )


@every_case
def test_tokens_stay_where_they_are(recipe: str, mesh: Mesh, budgets: Any) -> None:
    """Along `context`, states and windows may move, and tokens to their experts. What else moves has its reason in the
    budget."""
    name = f"{recipe} {mesh_text(mesh)}"
    moving = {f"{m}, {m.scope}": m for m in step_of(recipe, mesh).moved if m.kind in MOVING and not may_move(m)}
    unexplained = [f"{key}: {m.dtype}{list(m.dims)}" for key, m in moving.items() if not budgets.why(name, key)]
    assert not unexplained, "\n".join([f"{name} moves:", *unexplained])


def may_move(m: Moved) -> bool:
    if m.holds == "parameters" or (m.holds == "states" and m.axes == ("context",)):
        return True
    return m.kind in ("all-to-all", "ragged-all-to-all") and m.axes == ("expert",)


@every_case
def test_the_program_does_not_grow_with_depth(recipe: str, mesh: Mesh) -> None:
    deeper = num_lines(program_of(shrunk(recipe, mesh, repeats=4))[1])
    assert deeper == pytest.approx(step_of(recipe, mesh).traced_lines, rel=0.01)  # some sizes have to be padded


def num_lines(lowered: jax.stages.Lowered) -> int:
    return lowered.as_text().count("\n")


def test_the_compiled_program_does_not_grow_with_depth() -> None:
    shorter = step_of("deltanet_neg_tiny", TENSOR).instructions
    longer = compiled(shrunk("deltanet_neg_tiny", TENSOR, repeats=4)).instructions
    assert longer == pytest.approx(shorter, rel=0.01)  # a few constants


@pytest.mark.parametrize(("recipe", "mesh"), EVERY, ids=[name for name, _ in EVERY])
def test_state_of_a_device_is_within_the_budget(recipe: str, mesh: Mesh, budgets: Any) -> None:
    config = load_config(recipe)
    config = replace(config, train=replace(config.train, batch_size=NUM_SEQUENCES, num_microbatches=1))
    devices = make_mesh(mesh)
    with jax.set_mesh(devices):
        size = bytes_per_device(step_program(config, devices).state)
    budgets.check(f"{recipe} state {mesh_text(mesh)}", "any", bytes=size)


def names(found: Iterable[tuple[str, Mesh]], kind: str = "") -> set[str]:
    return {f"{name} {kind}{mesh_text(mesh)}" for name, mesh in found}


def test_budgets_are_those_of_these_cases(budgets: Any) -> None:
    committed = {name for name in budgets.committed if " on " not in name}
    needed = names(QUICK) | names(EVERY, "state ")
    assert needed <= committed <= needed | names(EVERY)


@pytest.mark.slow
def test_every_case_has_a_budget(budgets: Any) -> None:
    assert names(EVERY) <= set(budgets.committed)
