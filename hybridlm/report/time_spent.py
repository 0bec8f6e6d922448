"""Where a run's time went, and what happened to it."""

from hybridlm.report.bars import shares
from hybridlm.report.charts import chart
from hybridlm.report.curves import grid
from hybridlm.report.html import Markup, element, folded, section, table
from hybridlm.report.numbers import duration, is_number, num_bytes, number, percent
from hybridlm.report.overview import goodput_seconds
from hybridlm.report.runs import Run
from hybridlm.report.series import Record, series_of
from hybridlm.train.goodput import KINDS

MOST_EVENTS = 200
"""Told one by one; of longer lists the latest."""


def time_spent(run: Run, anchor: str) -> Markup:
    """Goodput: the share of steps that were kept, and the losses by name."""
    seconds = goodput_seconds(run)
    total = sum(seconds.values())
    losses = sorted((name for name in seconds if name != "steps"), key=lambda name: -seconds[name])
    parts = {KINDS.get(name, name): seconds[name] for name in ("steps", *losses) if name in seconds}
    texts = {name: duration(value) for name, value in parts.items()}
    good = percent(seconds.get("steps", 0.0) / total) if total else ""
    title = f"Goodput {good} of {duration(total)}" if total else ""
    line = series_of(run.metrics, "goodput")
    curve = chart(
        "Goodput so far", [line], note="share of all time since the first start", from_zero=True, is_log=False
    )
    bar = shares(title, parts, texts, ("spent on", "time", "share"))
    return section("Where the time went", anchor, bar, grid(curve))


def events(run: Run, anchor: str) -> Markup:
    """Starts, restores, rejected steps and the like one by one; of saves, how many and the last."""
    saves = [event for event in run.events if event.get("event") == "saved"]
    told = [event for event in run.events if event.get("event") != "saved"]
    rows = [
        [
            str(event.get("time", "")).replace("T", " "),
            str(event.get("event", "?")),
            number(event["step"]),
            _more(event),
        ]
        for event in told[-MOST_EVENTS:]
    ]
    parts = [_saves(saves)] if saves else []
    if rows:
        listed = table(("time", "event", "step", "more"), rows, text_columns=4)
        parts.append(listed if len(rows) <= 12 else folded(f"{len(told):,} events", listed))
    return section("What happened", anchor, *parts)


def _saves(saves: list[Record]) -> Markup:
    last = saves[-1]
    size, seconds, stall = last.get("bytes"), last.get("save_s"), last.get("save_stall_s")
    known = [
        num_bytes(size) if is_number(size) else "",
        f"written in {duration(seconds)}" if is_number(seconds) else "",
        f"training waited {duration(stall)}" if is_number(stall) else "",
    ]
    told = ", ".join(filter(None, known))
    times = "1 checkpoint was" if len(saves) == 1 else f"{len(saves):,} checkpoints were"
    return element("p", f"{times} saved; the last at step {number(last['step'])}" + (f": {told}." if told else "."))


def _more(event: Record) -> str:
    """What else an event tells."""
    known = {name: value for name, value in event.items() if name not in ("event", "step", "time")}
    return ", ".join(f"{name} {value}" for name, value in known.items())
