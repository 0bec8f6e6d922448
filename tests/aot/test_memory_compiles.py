"""A training step on a table of 16,777,216 x 512 over sixteen absent TPU chips: no gradient, copy or gather of it."""

import importlib
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm.sharding import make_mesh

BENCHMARKS = Path(__file__).parents[2] / "kernels/benchmarks"
ROWS = 16 * 1024**2
GIB = 2**30


@pytest.fixture
def memory_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, whose step this is."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("memory_table")


@pytest.mark.slow
@pytest.mark.parametrize("spread", ["rows", "grid, blocks of 128"])
def test_a_step_takes_little_more_than_the_table(spread: str, memory_table: Any, sixteen_chips: Any) -> None:
    """Dense gradients and Adam would peak above 6 GiB per chip; the table itself is 1 GiB of each."""
    with jax.set_mesh(make_mesh(memory_table.SPREADS[spread], sixteen_chips)):
        function, args, donated = memory_table.cases(ROWS, spread, "auto")["step"]
        compiled = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    assert compiled.memory_analysis().peak_memory_in_bytes < 1.25 * GIB
    table = r"bf16\[\d{7,},[124],128\]"  # this chip's part
    text = compiled.as_text()
    assert re.search(table + r"\{2,", text), "rows do not lie in one piece"
    assert not re.findall(rf"= \(?{table}\S* (?:copy|all-gather|all-gather-start|all-reduce|transpose)\(", text)
