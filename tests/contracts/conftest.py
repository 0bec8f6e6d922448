"""`budgets.json`: what compiled steps may hold and exchange. `pytest tests/contracts --update-budgets` writes it anew.

Of a case it holds, for each compiler, bytes of one device, and for each kind of collective how many arrays travel and
how many bytes they have. Another compiler merges and fuses otherwise; a program of one that is not in the file is held
to the rules alone, not to numbers. `why` is written by hand, for what looks wasteful: an update keeps it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

BUDGETS = Path(__file__).with_name("budgets.json")
TOLERANCE = 0.02  # of bytes: buffers are assigned by heuristics


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-budgets", action="store_true", help="write what is measured into budgets.json")


class Budgets:
    """The committed file, compared with what is measured, or replaced by it."""

    def __init__(self, update: bool):
        self.update = update
        self.committed: dict[str, dict[str, Any]] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        self.measured: dict[str, dict[str, Any]] = {}

    def check(self, name: str, compiler: str, **measured: Any) -> None:
        """Fail where the case `name` differs from its budget; skip where only other compilers have one.

        Numbers may differ by `TOLERANCE`, text not at all.
        """
        if self.update:
            self.measured.setdefault(name, {}).setdefault(compiler, {}).update(measured)
            return
        budget = self.committed.get(name)
        assert budget, f"{name} has no budget; write it with: pytest tests/contracts --update-budgets"
        if compiler not in budget:
            pytest.skip(f"no budget for {compiler}, but for {', '.join(set(budget) - {'why'})}")
        changed = [line for key in measured for line in differences(key, budget[compiler].get(key), measured[key])]
        assert not changed, "\n".join([f"{name} is not what budgets.json says:", *changed])

    def why(self, name: str, collective: str) -> str | None:
        """The reason that the file gives."""
        return self.committed.get(name, {}).get("why", {}).get(collective)

    def write(self) -> list[str]:
        """Put what was measured into the file. Returns what changed."""
        changes = []
        for name, by_compiler in self.measured.items():
            of_case = self.committed.setdefault(name, {})
            for compiler, measured in by_compiler.items():
                old = of_case.get(compiler, {})
                lines = (line for key in measured for line in differences(key, old.get(key), measured[key]))
                changes += [f"{name}: {line.strip()}" for line in lines]
                of_case[compiler] = old | measured
        text = json.dumps(dict(sorted(self.committed.items())), indent=2)
        BUDGETS.write_text(text + "\n")
        return changes


def differences(key: str, budget: Any, measured: Any) -> Iterator[str]:
    """One line for each; nested keys are joined by commas."""
    if isinstance(measured, dict):
        budget = budget or {}
        for name in budget | measured:
            yield from differences(f"{key}, {name}", budget.get(name), measured.get(name))
    elif isinstance(budget, int) and isinstance(measured, int):
        if abs(measured - budget) > TOLERANCE * budget:
            yield f"  {key}: {budget:,} became {measured:,}"
    elif budget != measured:
        yield f"  {key}: {budget or 'nothing'} became {measured or 'nothing'}"


CHANGES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def budgets(request: pytest.FixtureRequest) -> Iterator[Budgets]:
    update = request.config.getoption("--update-budgets", default=False)
    assert not (update and hasattr(request.config, "workerinput")), (
        "--update-budgets works in one process: leave out -n"
    )
    found = Budgets(bool(update))
    yield found
    if update:
        request.config.stash[CHANGES] = found.write()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(CHANGES, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def cpu_compiler() -> str:
    return f"jax {jax.__version__}, CPU"
