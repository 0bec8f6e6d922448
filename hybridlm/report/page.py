"""The whole page, and its file."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from hybridlm.config_check import ConfigError
from hybridlm.report import comparison, curves, evaluations, overview, planned, time_spent
from hybridlm.report.html import Markup, element, joined
from hybridlm.report.runs import Run, names_of, read_run
from hybridlm.report.script import SCRIPT
from hybridlm.report.style import STYLE

Section = Callable[[Run, str], Markup]

SECTIONS: dict[str, Section] = {
    "trained": overview.what_was_trained,
    "loss": curves.losses,
    "evaluations": evaluations.evaluations,
    "samples": evaluations.samples,
    "optimisation": curves.optimisation,
    "experts": curves.balance_of_experts,
    "memory": curves.use_of_memories,
    "states": curves.states,
    "speed": curves.speed,
    "time": time_spent.time_spent,
    "data": curves.data,
    "plan": planned.planned,
    "events": time_spent.events,
    "others": curves.others,
}
"""Of a run, by anchor, in their order on the page."""


def write_report(directories: Sequence[Path], out: Path, plan: Path | None = None) -> list[Run]:
    """Write the report of these runs to `out`, at once or not at all. Returns the runs.

    Raises ConfigError where one is no run, or `out` cannot be written.
    """
    runs = [read_run(path, name, plan) for path, name in zip(directories, names_of(directories), strict=True)]
    text = page_of(runs)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError(f"--out {out}", f": cannot be written: {error.strerror}") from None
    return runs


def page_of(runs: Sequence[Run]) -> str:
    """One HTML file, the same for the same runs; nothing in it is loaded from elsewhere."""
    if len(runs) == 1:
        (run,) = runs
        title = run.name
        head = _header("run report", title, overview.in_one_sentence(run), overview.status(run))
        body = joined([head, overview.headlines(run), *_sections(run, "")])
    else:
        title = ", ".join(run.name for run in runs)
        head = _header("runs compared", title, f"{len(runs)} runs.", "")
        body = joined([head, comparison.comparison(runs), *(_folded_run(n, run) for n, run in enumerate(runs, 1))])
    parts = (
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{title} · hybridlm"),
        Markup(f"<style>{STYLE}</style>"),
    )
    whole = element(
        "html",
        element("head", *parts),
        element("body", element("main", body), Markup(f"<script>{SCRIPT}</script>")),
        lang="en",
    )
    return f"<!doctype html>\n{whole}\n"


def _header(kind: str, title: str, sentence: str, status: str) -> Markup:
    inner = [element("p", f"hybridlm {kind}", class_="kind"), element("h1", title), element("p", sentence)]
    return element("header", *inner, *([element("p", status, class_="status")] if status else []))


def _sections(run: Run, prefix: str) -> list[Markup]:
    return [make(run, prefix + anchor) for anchor, make in SECTIONS.items()]


def _folded_run(n: int, run: Run) -> Markup:
    inner = [element("p", overview.in_one_sentence(run)), element("p", overview.status(run), class_="status")]
    return element(
        "details",
        element("summary", run.name),
        *inner,
        overview.headlines(run),
        *_sections(run, f"run{n}-"),
        class_="run",
    )
