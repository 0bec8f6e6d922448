"""What `hybridlm plan` said of the step beforehand, beside what was measured."""

from collections.abc import Mapping
from typing import Any

from hybridlm.report.bars import shares
from hybridlm.report.html import Markup, element, folded, section, table
from hybridlm.report.numbers import duration, is_number, num_bytes, number, percent, short
from hybridlm.report.runs import Run
from hybridlm.report.series import series_of

KINDS = ("parameters", "optimizer", "batch", "teacher", "activations", "temporaries", "code")
"""Of a device's memory at the peak of a step."""


def planned(run: Run, anchor: str) -> Markup:
    """Whether the step fits, what it holds and does, and the estimate of its time."""
    plan = run.plan
    if plan is None:
        return Markup()
    fits = "fits" if plan["fits"] else "does not fit"
    available = plan.get("available_bytes")
    room = f" of {num_bytes(available)}" if is_number(available) else ""
    needed = plan.get("needed_bytes")
    size = f": {num_bytes(needed)}{room} on each device" if is_number(needed) else ""
    devices = f"{plan.get('num_devices', '?')} × {plan.get('device_kind', '?')}"
    lead = f"On {plan['topology']} ({devices}) the step {fits}{size}. Estimates of the compiler, not measurements."
    return section("Plan", anchor, _memory(plan), _time(run, plan), _work(plan), _collectives(plan), lead=lead)


def _memory(plan: Mapping[str, Any]) -> Markup:
    sizes = {kind: plan["memory"].get(kind) or 0 for kind in KINDS}
    held = {kind: size for kind, size in sizes.items() if size or kind != "teacher"}
    texts = {kind: num_bytes(size) for kind, size in held.items()}
    return shares("Memory of a device at the peak", held, texts, ("kind", "size", "share"))


def _time(run: Run, plan: Mapping[str, Any]) -> Markup:
    """The estimate between all communication hidden and none, and what the run measured on its own devices."""
    found = plan.get("estimate")
    if not found:
        return Markup()
    fast, slow, tokens = found["step_s_overlapped"], found["step_s_serial"], plan.get("tokens") or 0
    measured = {name: series_of(run.metrics, name) for name in ("step_time_s", "tokens_per_second", "mfu")}
    middle = {name: None if line is None else line.median for name, line in measured.items()}
    seconds, rate = middle["step_time_s"], middle["tokens_per_second"]
    rows = [
        ["seconds per step", duration(fast), duration(slow), duration(seconds) if seconds else number(None)],
        ["tokens per second", short(tokens / fast), short(tokens / slow), short(rate) if rate else number(None)],
        ["MFU", percent(found.get("mfu_overlapped")), percent(found.get("mfu_serial")), percent(middle["mfu"])],
    ]
    head = ("", "all communication hidden", "none hidden", "this run, median")
    return element("div", element("h3", "Time"), table(head, rows))


def _work(plan: Mapping[str, Any]) -> Markup:
    costs = plan.get("costs") or {}
    if not costs:
        return Markup()
    flops = sum(cost["flops"] for cost in costs.values()) or 1.0
    rows = [
        [name, short(cost["flops"]), percent(cost["flops"] / flops), num_bytes(cost["hbm_bytes"])]
        for name, cost in sorted(costs.items(), key=lambda item: -item[1]["flops"])
    ]
    return folded("work of a device by part", table(("part", "FLOPs", "share", "HBM traffic"), rows))


def _collectives(plan: Mapping[str, Any]) -> Markup:
    found = plan.get("collectives") or ()
    rows = [
        [each["kind"], " ".join(each["axes"]), each.get("scope") or "", number(each["runs"]), num_bytes(each["bytes"])]
        for each in sorted(found, key=lambda each: -each["runs"] * each["bytes"])
    ]
    head = ("kind", "axes", "for", "runs", "bytes of one")
    return folded(f"{len(rows):,} collectives of a step", table(head, rows, text_columns=3)) if rows else Markup()
