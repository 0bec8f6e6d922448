"""Curves of training: losses, learning rate, gradients, speed, and what the blocks tell of themselves."""

from collections.abc import Callable, Sequence

from hybridlm.report.charts import SMOOTH_FROM, chart
from hybridlm.report.html import Markup, element, folded, section, table
from hybridlm.report.numbers import is_number, number, percent
from hybridlm.report.runs import Run, step_of
from hybridlm.report.series import Record, Series, series_of

TITLES = {
    "aux/moe_max_load": ("Load of the busiest expert", "over the mean; 1 is balance"),
    "aux/moe_min_load": ("Load of the idlest expert", "over the mean; 1 is balance"),
    "aux/moe_load_entropy": ("Entropy of the loads", "over that of even loads; 1 is balance"),
    "aux/moe_dropped": ("Choices dropped", "share that found no place at its expert"),
    "aux/moe_experts_per_token": ("Experts per token", ""),
    "aux/moe_balance_loss": ("Balance loss", "with its weight"),
    "aux/moe_sequence_balance_loss": ("Balance loss by sequence", "with its weight"),
    "aux/moe_z_loss": ("Router z-loss", "with its weight"),
    "aux/moe_importance_loss": ("Importance loss", "with its weight"),
    "aux/moe_load_loss": ("Load loss", "with its weight"),
    "aux/moe_entropy_loss": ("Entropy loss", "with its weight"),
    "aux/memory_used": ("Rows read", "share of a memory's rows that a step reads"),
    "aux/memory_kl": ("Unevenness of reads", "KL divergence from even use, nats"),
    "aux/memory_statistics_loss": ("Statistics of queries", "loss"),
}
"""Of metrics by name: title and note."""
ELSEWHERE = {
    *("step", "tokens", "loss", "bits_per_byte", "lr", "grad_norm", "tokens_per_second", "mfu", "step_time_s"),
    *("data_wait_s", "goodput", "batch_tokens", "nonfinite_in_a_row", "nonfinite_total", "save_s", "save_stall_s"),
}
"""Metrics with a chart or a sentence of their own."""


def losses(run: Run, anchor: str) -> Markup:
    """Loss and bits per byte, of training and of held-out text."""
    restarts = [step_of(event) for event in run.events if event.get("event") in ("restored", "rolled back")]
    restarts = [step for step in restarts if step]

    def both(title: str, name: str, note: str) -> Markup:
        lines = [
            series_of(run.metrics, name, label="training"),
            series_of(run.held_out, name, label="held out", dots=True),
        ]
        return chart(title, lines, note=note, smooth=True, marks=restarts)

    marked = " Dashed lines: the run went on from a checkpoint there." if restarts else ""
    positions = _by_position(run)
    smoothed = len(run.metrics) >= SMOOTH_FROM
    lead = ("Thin lines are single records, thick ones running means." if smoothed else "") + marked
    charts = (both("Loss", "loss", "nats per token"), both("Bits per byte", "bits_per_byte", "of the text"), positions)
    return section("Loss", anchor, grid(*charts), rejected(run), lead=lead.strip() if any(charts) else "")


def _by_position(run: Run) -> Markup:
    """Held-out loss over the position in the window, of the last evaluation."""
    found = run.held_out[-1].get("by_position") if run.held_out else None
    if not isinstance(found, list) or len(found) < 2:
        return Markup()
    rows: list[dict[str, object]] = [{"position": end, "loss": loss} for _, end, loss in found]
    line = series_of(rows, "loss", label="held out", x="position", dots=True)
    note = "nats per token, at the last evaluation"
    return chart("Held-out loss by position", [line], note=note, x_name="position", x_log=True)


def rejected(run: Run) -> Markup:
    """Steps that changed nothing, and values that were not finite, where there are any."""
    bad = [record for record in run.metrics if "loss" in record and record["loss"] is None]
    total = run.metrics[-1].get("nonfinite_total") if run.metrics else 0
    if not bad and not total:
        return Markup()
    told = [f"{number(total)} steps were rejected and changed nothing"] if total else []
    told += [f"{len(bad):,} logged losses were not finite"] if bad else []
    return element("p", "; ".join(told) + ".", class_="warning")


def optimisation(run: Run, anchor: str) -> Markup:
    """Learning rate and gradient norm."""
    optimizer = run.config.optimizer
    clip, schedule = getattr(optimizer, "clip_norm", None), type(optimizer.schedule).__name__
    clipped = f"before clipping to {clip:g}" if clip else "not clipped"
    return section(
        "Optimisation",
        anchor,
        grid(
            chart("Learning rate", [series_of(run.metrics, "lr")], note=schedule, is_log=False, from_zero=True),
            chart("Gradient norm", [series_of(run.metrics, "grad_norm")], note=clipped, smooth=True),
        ),
    )


def speed(run: Run, anchor: str) -> Markup:
    """Throughput, MFU, step time and waiting for data."""

    def of(title: str, name: str, note: str, unit: Callable[[float], str]) -> Markup:
        line = series_of(run.metrics, name)
        middle = "" if line is None or line.median is None else f"; median {unit(line.median)}"
        return chart(title, [line], note=note + middle, from_zero=True, is_log=False, smooth=True)

    waits = series_of(run.metrics, "data_wait_s")
    return section(
        "Speed",
        anchor,
        grid(
            of("Tokens per second", "tokens_per_second", "all devices", number),
            of("MFU", "mfu", "model FLOPs over the devices' peak", percent),
            of("Seconds per step", "step_time_s", "without evaluations and saves", number),
            chart("Waiting for data", [waits], note="seconds between two records", from_zero=True, is_log=False)
            if waits is not None and waits.y.max(initial=0.0) > 0
            else "",
        ),
    )


def balance_of_experts(run: Run, anchor: str) -> Markup:
    lead = "How evenly routers spread tokens over experts, as means over layers."
    return _of_blocks(run, "Experts", anchor, lambda name: name.startswith("aux/moe_"), lead, "layer")


def use_of_memories(run: Run, anchor: str) -> Markup:
    lead = "How much of the memories' tables is read, as means over tables."
    return _of_blocks(run, "Memory layers", anchor, lambda name: name.startswith("aux/memory_"), lead, "table")


def states(run: Run, anchor: str) -> Markup:
    """Norms by length, of the last `hybridlm eval --task collapse`, and metrics of states."""
    records = run.tasks.get("collapse") or [{}]
    found = records[-1].get("by_length")
    rows: list[Record] = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    layers = [name for name in rows[0] if name.startswith("layer ")] if rows else []
    lines = [series_of(rows, name, x="length") for name in layers]
    note = f"in a text read at a stretch, at step {step_of(records[-1]):,}"
    norms = chart("Norm of the recurrent state", lines, note=note, x_name="length", x_log=True)
    return _of_blocks(run, "Recurrent states", anchor, _is_of_state, "", "layer", norms)


def others(run: Run, anchor: str) -> Markup:
    """All numbers that no other section shows."""

    def is_other(name: str) -> bool:
        known = name in ELSEWHERE or name.startswith(("tokens/", "epoch/", "layers/", "aux/moe_", "aux/memory_"))
        return not known and not _is_of_state(name)

    return _of_blocks(run, "Other metrics", anchor, is_other, "", "layer")


def _is_of_state(name: str) -> bool:
    return "state" in name and not name.startswith(("layers/", "tokens/", "epoch/", "aux/memory_"))


def _of_blocks(
    run: Run, title: str, anchor: str, wanted: Callable[[str], bool], lead: str, part: str, *first: Markup
) -> Markup:
    """The charts `first`, one for each metric that is `wanted`, and the last values of each layer or table."""
    names = sorted({name for record in run.metrics for name in record if wanted(name)}, key=_order)
    charts = [*first]
    for name in names:
        shown, note = title_of(name)
        charts.append(chart(shown, [series_of(run.metrics, name)], note=note, smooth=True))
    return section(title, anchor, grid(*charts), _by_layer(run, names, part), lead=lead)


def _order(name: str) -> tuple[int, str]:
    """Those with titles in the order of these, the others behind."""
    known = list(TITLES)
    return (known.index(name) if name in known else len(known), name)


def title_of(name: str) -> tuple[str, str]:
    """Title and note of a metric."""
    return TITLES.get(name, (name.removeprefix("aux/").replace("_", " "), ""))


def _by_layer(run: Run, names: Sequence[str], part: str) -> Markup:
    """The last record's lists, one line a layer."""
    columns: dict[str, list[object]] = {}
    for name in names:
        key = "layers/" + name.removeprefix("aux/")
        lists = [record[key] for record in run.metrics[-1:] if isinstance(record.get(key), list)]
        columns |= {title_of(name)[0]: values for values in lists if isinstance(values, list) and len(values) > 1}
    if not columns:
        return Markup()
    length = max(map(len, columns.values()))
    rows = [
        [str(n), *(number(values[n]) if n < len(values) else number(None) for values in columns.values())]
        for n in range(length)
    ]
    return folded(f"each {part} at step {run.last_step:,}", table([part, *columns], rows))


def data(run: Run, anchor: str) -> Markup:
    """Tokens by source, where there is more than one, and how often each was gone through."""
    names = sorted(
        {name.removeprefix("tokens/") for record in run.metrics for name in record if name.startswith("tokens/")}
    )
    if not names:
        return Markup()
    last = run.metrics[-1]
    tokens = {name: last.get(f"tokens/{name}") or 0 for name in names}
    total = sum(value for value in tokens.values() if is_number(value))
    rows = [
        [
            name,
            number(value),
            percent(value / total if total and is_number(value) else None),
            number(last.get(f"epoch/{name}"), 3),
        ]
        for name, value in tokens.items()
    ]
    lines: list[Series | None] = [series_of(run.metrics, f"tokens/{name}", label=name) for name in names]
    drawn = chart("Tokens by source", lines, from_zero=True, is_log=False) if len(names) > 1 else Markup()
    told = table(("source", "tokens", "share", "epochs"), rows)
    return section("Data", anchor, grid(drawn, element("figure", told)))


def grid(*figures: str) -> Markup:
    """Side by side where there is room."""
    shown = [figure for figure in figures if figure]
    return element("div", *shown, class_="grid-of-charts") if shown else Markup()
