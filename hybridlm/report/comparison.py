"""Several runs beside each other."""

from collections.abc import Sequence
from typing import Any

from hybridlm import config_io
from hybridlm.report.charts import chart
from hybridlm.report.curves import grid
from hybridlm.report.evaluations import columns_of
from hybridlm.report.html import Markup, element, joined, section, table
from hybridlm.report.numbers import ABSENT, number
from hybridlm.report.overview import final_numbers
from hybridlm.report.runs import Run, step_of
from hybridlm.report.series import Series, series_of

LESS_IS_BETTER = ("held-out bits per byte", "held-out loss", "held-out perplexity", "training loss")
MORE_IS_BETTER = ("tokens per second", "MFU", "goodput")


def comparison(runs: Sequence[Run]) -> Markup:
    """Final numbers, where the configs differ, curves over steps and over tokens, and tasks."""
    return joined([final_table(runs), differences(runs), curves(runs), tasks(runs)])


def final_table(runs: Sequence[Run]) -> Markup:
    """What each run came to, the best of each row in bold."""
    found = [final_numbers(run) for run in runs]
    rows = []
    for name in found[0]:
        texts, values = zip(*(numbers[name] for numbers in found), strict=True)
        known = [value for value in values if value is not None]
        best = (
            min(known) if name in LESS_IS_BETTER and known else max(known) if name in MORE_IS_BETTER and known else None
        )
        if known:
            cells = [
                element("b", text) if best is not None and value == best and len(set(known)) > 1 else text
                for text, value in zip(texts, values, strict=True)
            ]
            rows.append([name, *cells])
    lead = "At the last step of each; speed and MFU are medians. Bold: the best of its row."
    return section("Final numbers", "final", table(["", *(run.name for run in runs)], rows), lead=lead)


def differences(runs: Sequence[Run]) -> Markup:
    """Every field of the configs in which two runs differ."""
    rows = differing([run.config for run in runs])
    told = table(["field", *(run.name for run in runs)], rows, text_columns=len(runs) + 1)
    return section("Configs", "configs", told if rows else element("p", "They are the same in every field."))


def differing(values: Sequence[Any], path: str = "") -> list[list[str]]:
    """A path, and the value of each config, for all that is not the same; nodes of other classes by their class."""
    if all(value == values[0] for value in values):
        return []
    parts = [config_io.children(value) for value in values]
    if any(part is None for part in parts) or len({type(value) for value in values}) > 1:
        return [[path, *map(config_io.as_text, values)]]
    names = dict.fromkeys(name for part in parts if part for name in part)
    rows: list[list[str]] = []
    for name in names:
        below = [part[name] if part and name in part else _Absent for part in parts]
        where = config_io.join(path, name)
        if _Absent in below:
            rows.append([where, *(ABSENT if value is _Absent else config_io.as_text(value) for value in below)])
        else:
            rows += differing(below, where)
    return rows


class _Absent:
    """Stands for an element that a shorter tuple does not have."""


def curves(runs: Sequence[Run]) -> Markup:
    """Losses over steps and over tokens, and speed."""

    def over(title: str, name: str, note: str, x: str = "step", *, held_out: bool = False) -> Markup:
        lines = [_line(run, name, x, held_out=held_out) for run in runs]
        return chart(title, lines, note=note, x_name=x, smooth=True)

    held = "held-out text"
    charts = (
        over("Bits per byte", "bits_per_byte", held, held_out=True),
        over("Bits per byte", "bits_per_byte", held, "tokens", held_out=True),
        over("Training loss", "loss", "nats per token"),
        over("Training loss", "loss", "nats per token", "tokens"),
        over("Gradient norm", "grad_norm", "before clipping"),
        over("Tokens per second", "tokens_per_second", "all devices"),
    )
    return section("Curves", "curves", grid(*charts))


def _line(run: Run, name: str, x: str, *, held_out: bool) -> Series | None:
    records = run.held_out if held_out else run.metrics
    if held_out:
        per_step = run.config.train.batch_size * run.config.data.seq_len
        records = [record | {"tokens": step_of(record) * per_step} for record in records]
    return series_of(records, name, label=run.name, x=x, dots=held_out)


def tasks(runs: Sequence[Run]) -> Markup:
    """The last result of each run, a table for each task."""
    parts = []
    for task in dict.fromkeys(task for run in runs for task in run.tasks):
        last = [run.tasks[task][-1] if task in run.tasks else {} for run in runs]
        names = columns_of(last)
        rows = [
            [run.name, number(record.get("step")), *(number(record.get(name)) for name in names)]
            for run, record in zip(runs, last, strict=True)
        ]
        head = ["run", "step", *(name.replace("_", " ") for name in names)]
        parts.append(element("div", element("h3", task), table(head, rows)))
    return section("Evaluations", "evaluations", *parts)
