"""Tables of evaluations, and what the model wrote."""

from collections.abc import Sequence

from hybridlm.report.html import Markup, element, folded, joined, section, table
from hybridlm.report.numbers import is_number, number
from hybridlm.report.runs import Run, step_of
from hybridlm.report.series import Record

HELD_OUT = ("loss", "perplexity", "bits_per_byte", "tokens")
EARLIER_SAMPLES = 20


def evaluations(run: Run, anchor: str) -> Markup:
    """Held-out text and every task, a table each."""
    parts = []
    if run.held_out:
        names = [name for name in (*HELD_OUT, *columns_of(run.held_out)) if name != "bytes"]
        parts.append(_titled("Held-out text", run.held_out, list(dict.fromkeys(names))))
    parts += [_titled(task, records, columns_of(records)) for task, records in run.tasks.items()]
    return section("Evaluations", anchor, *parts)


def columns_of(records: Sequence[Record]) -> list[str]:
    """The names of numbers in any record, in the order in which they come first."""
    return list(
        dict.fromkeys(name for r in records for name, value in r.items() if name != "step" and is_number(value))
    )


def _titled(title: str, records: Sequence[Record], names: Sequence[str]) -> Markup:
    rows = [[number(record.get("step")), *(number(record.get(name)) for name in names)] for record in records]
    head = ["step", *(name.replace("_", " ") for name in names)]
    if len(rows) <= 12:
        return element("div", element("h3", title), table(head, rows))
    earlier = folded(f"all {len(rows):,}", table(head, rows))
    return element("div", element("h3", title), table(head, rows[-3:], caption="the latest"), earlier)


def samples(run: Run, anchor: str) -> Markup:
    """How each prompt went on, the latest text in full and the ones before it folded."""
    by_prompt: dict[str, list[Record]] = {}
    for record in run.samples:
        if isinstance(record.get("prompt"), str) and isinstance(record.get("text"), str):
            by_prompt.setdefault(str(record["prompt"]), []).append(record)
    parts = []
    for prompt, records in by_prompt.items():
        *earlier, last = sorted(records, key=step_of)
        shown = [element("h3", f"step {step_of(last):,}"), _text(prompt, last)]
        before = [
            joined([element("h4", f"step {step_of(record):,}"), _text(prompt, record)])
            for record in reversed(earlier[-EARLIER_SAMPLES:])
        ]
        if before:
            shown.append(folded(f"{len(before)} before", *before))
        parts.append(element("div", *shown, class_="sample"))
    lead = "The prompt in bold, and how the model goes on, drawn at temperature 1."
    return section("Samples", anchor, *parts, lead=lead)


def _text(prompt: str, record: Record) -> Markup:
    return element("pre", element("b", prompt), str(record["text"]))
