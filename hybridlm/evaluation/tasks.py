"""The tasks of `hybridlm eval --task`: one line each."""

from collections.abc import Callable, Sequence, Set

from hybridlm.config_check import ConfigError, suggestion
from hybridlm.evaluation import collapse, lambada, multiple_choice, passkey, recall, text_losses
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.task import Report, Task, numbers

HARNESS = "harness:"
"""Before the name of a task of lm-evaluation-harness."""


TASKS: dict[str, Task] = {}


def register(
    name: str,
    summary: str,
    run: Callable[[Scorer, Options], Report],
    lines: Callable[[Report], Sequence[str]],
    reads: Set[str],
    charted: Set[str] = frozenset(),
) -> None:
    """Let `--task NAME` run `run` and print `lines` of its report."""
    TASKS[name] = Task(
        summary=summary,
        run=run,
        lines=lines,
        reads=frozenset(reads),
        needs_file="file" in reads,
        charted=frozenset(charted),
    )


def with_cells(report: Report) -> list[str]:
    return [*numbers(report), *passkey.lines_of(report["cells"])]


TEXT = {"data", "windows", "stride"}
DOMAINS = {"domain_field", "by_file", "bootstrap", "seed"}
QUESTIONS = {"file", "limit", "bootstrap", "seed", "read_twice"}
GRID = {"length", "depth", "samples", "seed", "read_twice"}

register("perplexity", "loss per token, byte and word", text_losses.text_losses, text_losses.lines_of, TEXT | DOMAINS)
register("multiple_choice", "questions with choices, in a file", multiple_choice.multiple_choice, numbers, QUESTIONS)
register("lambada", "the last words of the passages in a file", lambada.lambada, numbers, QUESTIONS)
register("passkey", "a number hidden in noise, by length and depth", passkey.passkey, with_cells, GRID)
register("needle", "a number hidden in text, by length and depth", passkey.needle, with_cells, GRID | {"data"})
register("recall", "tokens that the context has shown, and others", recall.recall, numbers, TEXT | {"ngram", "rare"})
LENGTH = {"data", "length"}
register("collapse", "states far beyond training", collapse.collapse, collapse.lines_of, LENGTH, {"by_length"})


def task_named(name: str) -> Task:
    """Raises ConfigError where there is none of that name, or lm-evaluation-harness is not installed."""
    if name.startswith(HARNESS):
        from hybridlm.evaluation.harness import task_of_harness  # Only where it is asked for: it may be absent.

        return task_of_harness(name.removeprefix(HARNESS))
    if name not in TASKS:
        known = suggestion(name, TASKS) or f"; there are {', '.join(TASKS)}, and {HARNESS}NAME"
        raise ConfigError(f"--task {name}", f": no such task{known}")
    return TASKS[name]
