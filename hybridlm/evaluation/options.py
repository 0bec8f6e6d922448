"""What the tasks of `hybridlm eval` are asked for; every task reads the fields that concern it."""

from dataclasses import dataclass
from pathlib import Path

from hybridlm.evaluation.windows import Mode


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command line, checked there."""

    data: str | None = None
    """Text instead of the run's held-out text."""
    file: Path | None = None
    """Of the task."""
    include: Path | None = None
    """A directory of tasks, instead of those that lm-evaluation-harness has."""
    windows: Mode = "packed"
    stride: int | None = None
    """Of sliding windows, in tokens."""
    domain_field: str | None = None
    by_file: bool = False
    bootstrap: int | None = None
    """Replicates."""
    seed: int = 0
    limit: int | None = None
    """The first so many documents or questions."""
    read_twice: bool = False
    length: tuple[int, ...] | None = None
    """Of prompts or texts, in tokens."""
    depth: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where in a prompt the answer is: 0 is its beginning."""
    samples: int = 8
    """Prompts of each length and depth."""
    ngram: int = 2
    rare: int | None = None
    """N-grams that the training text holds more often are no recall."""
