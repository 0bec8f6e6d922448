"""Steps that the TPU compiler makes for sixteen absent chips: their collectives, their bytes, and no gather of tokens.

With two repeats of the pattern, or of its last layers. An axis that 17 divides is one of time, as in the tests of every
recipe.
"""

import functools
import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import pytest
from hybridlm_kernels.bench.hlo import Program

from hybridlm.config import Config, Mesh
from hybridlm.config_io import load_config
from hybridlm.plan.collectives import Collective, collectives
from hybridlm.plan.compile import compile_step
from hybridlm.plan.memory import Memory, memory
from hybridlm.plan.topology import prepare_process, topology

TIME = 17
LENGTH = 128 * TIME  # tokens of one chip: whole blocks of the kernels
TOPOLOGY = "v5e:4x4"
CASES = {
    "griffin_tiny": Mesh(data=1, fsdp=-1),
    "hawk_tiny": Mesh(data=1, fsdp=-1, context=4),
    "gdn_moe_tiny": Mesh(data=1, fsdp=-1, expert=4),
}
LAST_LAYERS = {"gdn_moe_tiny": 2}  # Gated DeltaNet and attention; a layer takes half a minute to compile
pytestmark = pytest.mark.slow
every_case = pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in CASES]
)


@pytest.fixture(scope="session")
def tpu_compiler() -> str:
    pytest.importorskip("libtpu", reason="needs libtpu, which brings the TPU compiler: pip install 'hybridlm[tpu]'")
    return f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"


def config_of(recipe: str) -> Config:
    config, mesh = load_config(recipe), CASES[recipe]
    pattern = config.model.pattern[-LAST_LAYERS.get(recipe, 0) :]
    return replace(
        config,
        model=replace(config.model, pattern=pattern, num_layers=2 * len(pattern)),
        data=replace(config.data, seq_len=LENGTH * mesh.context),
        train=replace(config.train, batch_size=32, num_microbatches=1),
        sharding=replace(config.sharding, mesh=mesh),
    )


@dataclass(frozen=True)
class Step:
    """What is asked of a compiled step."""

    collectives: tuple[Collective, ...]
    memory: Memory
    gathered: tuple[str, ...]
    """Types of what all-gathers make."""


@functools.cache
def step_of(recipe: str) -> Step:
    where = topology(TOPOLOGY)
    prepare_process(where)
    made = compile_step(config_of(recipe), where)
    held = memory(made.dump, made.program, made.step.state, made.step.batch)
    return Step(tuple(collectives(made.program, made.mesh)), held, tuple(gathers(made.program)))


def gathers(program: Program) -> Iterator[str]:
    """Wherever they stand, also in fusions."""
    for body in program.computations.values():
        for i in body.values():
            if i.opcode in ("all-gather", "all-gather-start"):
                yield i.result


@every_case
def test_collectives_of_a_chip_are_those_of_the_budget(recipe: str, budgets: Any, tpu_compiler: str) -> None:
    """Bytes of parameters and gradients do not depend on how XLA merges collectives; how many there are does."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for c in step_of(recipe).collectives:
        of_kind = total[f"{c.kind} along {'+'.join(c.axes)}, {c.dtype}"]
        of_kind[0] += c.runs
        of_kind[1] += c.runs * c.bytes
    counted = {key: f"{runs} runs, {size:,} bytes" for key, (runs, size) in sorted(total.items())}
    budgets.check(f"{recipe} on {TOPOLOGY}", tpu_compiler, collectives=counted)


@every_case
def test_memory_of_a_chip_is_within_the_budget(recipe: str, budgets: Any, tpu_compiler: str) -> None:
    held = step_of(recipe).memory
    of_chip = {name: getattr(held, name) for name in ("parameters", "optimizer", "activations", "temporaries", "code")}
    budgets.check(f"{recipe} on {TOPOLOGY}", tpu_compiler, bytes=of_chip)


@every_case
@pytest.mark.usefixtures("tpu_compiler")
def test_no_tokens_are_gathered(recipe: str, budgets: Any) -> None:
    """But for what the budget gives a reason for."""
    of_tokens = {text for text in step_of(recipe).gathered if any(n % TIME == 0 for n in dims_in(text))}
    assert not of_tokens or budgets.why(f"{recipe} on {TOPOLOGY}", "all-gather of tokens"), of_tokens


def dims_in(types: str) -> list[int]:
    return [int(n) for dims in re.findall(r"\[([\d,]+)\]", types) for n in dims.split(",")]


def test_budgets_are_those_of_these_cases(budgets: Any) -> None:
    known = {f"{recipe} on {TOPOLOGY}" for recipe in CASES}
    assert {name for name in budgets.committed if " on " in name} == known
