"""What a task of `hybridlm eval` is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer

Report = dict[str, Any]
"""Numbers and words by name; what is a list goes to --json alone, but for what is `charted`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    summary: str
    run: Callable[[Scorer, Options], Report]
    lines: Callable[[Report], Sequence[str]]
    """A report for people."""
    reads: frozenset[str]
    """The fields of `Options` that it heeds."""
    needs_file: bool = False
    charted: frozenset[str] = frozenset()
    """Lists that eval.jsonl holds too, for charts of `hybridlm report`."""


def numbers(report: Mapping[str, Any]) -> list[str]:
    """A line for each number, with its interval where there is one."""
    lines = []
    for name, value in report.items():
        if isinstance(value, list | dict) or name.endswith(("_low", "_high")):
            continue
        low, high = (report.get(f"{name}_{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f"   [{low:.4f}, {high:.4f}]"
        text = f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
        lines.append(f"{name:16} {text}{interval}")
    return lines
