"""A plan as text for people."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from hybridlm.plan.collectives import Collective
from hybridlm.plan.memory import Buffer
from hybridlm.plan.report import Report
from hybridlm.sharding import mesh_text

GIB = 2**30
NUM_BUFFERS = 5


def describe(name: str, report: Report) -> str:
    """The whole report."""
    parts = [_head(name, report), _memory(report), _costs(report), _collectives(report.collectives), _estimate(report)]
    return "\n\n".join(parts)


def ranking(reports: Sequence[tuple[str, Report]]) -> str:
    """A table of steps as they are ranked, each with its flags."""
    rows, flags = [("", "mesh", "remat", "batch", "micro", "GiB", "step", "MFU %", "tokens/s")], ["flags"]
    for n, (flags_of, report) in enumerate(reports, 1):
        found = report.estimate
        assert found is not None and report.tokens_per_second is not None
        shape = (mesh_text(report.mesh), report.remat, str(report.batch_size), str(report.num_microbatches))
        rates = (
            f"{duration(found.step_s_overlapped)} - {duration(found.step_s_serial)}",
            f"{100 * found.mfu_overlapped:.0f} - {100 * found.mfu_serial:.0f}",
            f"{report.tokens_per_second:,.0f}" if report.fits else "too large",
        )
        rows.append((str(n), *shape, gib(report.needed_bytes), *rates))
        flags.append(flags_of or "(as it is)")
    return "\n".join(f"{line}  {each}" for line, each in zip(table(rows, 3), flags, strict=True))


def verdict(report: Report) -> str:
    """`fits: 41.27 of 95.00 GiB on each device`."""
    available = "" if report.available_bytes is None else f" of {gib(report.available_bytes)}"
    return f"{'fits' if report.fits else 'does not fit'}: {gib(report.needed_bytes)}{available} GiB on each device"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def unit_of(largest: float, units: str = "kMGTPE", base: int = 1000) -> tuple[float, str]:
    """The unit, with its prefix, of which `largest` is at least one."""
    power = 0
    while largest >= base ** (power + 1) and power < len(units):
        power += 1
    return float(base**power), units[power - 1] if power else ""


def duration(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def table(rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Aligned lines; the first `left` columns to the left, the others to the right, the last one as it is."""
    rows = list(rows)
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if n < left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines


def _head(name: str, report: Report) -> str:
    micro = f" in {report.num_microbatches} microbatches" if report.num_microbatches > 1 else ""
    rows = (
        f"{name} on {report.topology} {verdict(report)}",
        f"devices   {report.num_devices} x {report.device_kind}, mesh {mesh_text(report.mesh)}",
        f"step      {report.batch_size:,} x {report.seq_len:,} = {report.tokens:,} tokens{micro}, remat {report.remat}",
        f"compiler  traced in {report.trace_seconds:.1f} s, compiled in {report.compile_seconds:.1f} s",
    )
    return "\n".join(rows)


def _memory(report: Report) -> str:
    held = report.memory
    size, prefix = unit_of(held.total, "KMGT", 1024)
    unit = f"{prefix}iB" if prefix else "bytes"
    of_teacher = ("teacher",) if held.teacher else ()
    kinds = ("parameters", "optimizer", "batch", *of_teacher, "activations", "temporaries", "code", "total")
    rows = [(kind, f"{getattr(held, kind) / size:.3f}") for kind in kinds]
    buffers = [_buffer(buffer, size) for buffer in held.largest[:NUM_BUFFERS]]
    return "\n".join(
        [f"memory of a device at the step's peak, {unit}", *table(rows, 1), f"the largest in it, {unit}"]
        + table(buffers, 4)
    )


def _buffer(buffer: Buffer, size: float) -> tuple[str, ...]:
    return f"{buffer.bytes / size:.3f}", buffer.kind, buffer.shape, buffer.source or _shortened(buffer.op_name)


def _shortened(name: str, length: int = 60) -> str:
    return name if len(name) <= length else "..." + name[-length:]


def _costs(report: Report) -> str:
    flops = sum(cost.flops for cost in report.costs.values())
    moved = sum(cost.hbm_bytes for cost in report.costs.values())
    (flop, prefix), (byte, byte_prefix) = unit_of(flops), unit_of(moved)
    head = ("", f"{prefix}FLOP", "%", f"HBM {byte_prefix}B", "%")

    def row(name: str, flops_of: float, moved_of: float) -> tuple[str, ...]:
        shares = _percent(flops_of, flops), _percent(moved_of, moved)
        return name, f"{flops_of / flop:.3f}", shares[0], f"{moved_of / byte:.3f}", shares[1]

    rows = [row(scope, cost.flops, cost.hbm_bytes) for scope, cost in report.costs.items()]
    lines = ["work of a device in a step", *table([head, *rows, row("total", flops, moved)], 1)]
    share = report.model_flops / report.num_devices / flop
    lines.append(f"  the model's own, with nothing run twice: {share:.3f} {prefix}FLOP")
    if report.unknown_kernels:
        names = dict.fromkeys(name.removesuffix("/pallas_call").rpartition("/")[2] for name in report.unknown_kernels)
        lines.append(f"  FLOPs not known, and not in the table: {', '.join(names)}")
    return "\n".join(lines)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}" if whole else ""


def _collectives(found: Sequence[Collective]) -> str:
    """One line for those of a kind, along the same axes."""
    if not found:
        return "collectives of a step: none"
    groups: dict[tuple[str, str, str], list[Collective]] = defaultdict(list)
    for c in found:
        groups[c.kind, "+".join(c.axes), c.dtype].append(c)
    moved = {key: sum(c.runs * c.bytes for c in group) for key, group in groups.items()}
    size, prefix = unit_of(max(moved.values()))
    rows, scopes = [("kind", "axes", "dtype", "runs", f"{prefix}B", "async %")], ["for"]
    for key in sorted(groups, key=lambda key: -moved[key]):
        hidden = sum(c.runs * c.bytes for c in groups[key] if c.asynchronous)
        runs = sum(c.runs for c in groups[key])
        rows.append((*key, f"{runs:,}", f"{moved[key] / size:.3f}", _percent(hidden, moved[key])))
        scopes.append(", ".join(dict.fromkeys(c.scope or "other" for c in groups[key])))
    lines = [f"{line}  {scope}" for line, scope in zip(table(rows, 3), scopes, strict=True)]
    return "\n".join(["collectives of a device in a step", *lines])


def _estimate(report: Report) -> str:
    found = report.estimate
    if found is None:
        return f"no estimate of time: the rates of {report.device_kind} are not known"
    fast, slow = found.step_s_overlapped, found.step_s_serial
    along = ", ".join(f"{duration(seconds)} along {axes}" for axes, seconds in found.collective_s.items())
    return "\n".join(
        (
            "roofline estimate, not a measurement",
            f"  step      {duration(fast)} with all communication hidden, {duration(slow)} with none",
            f"  tokens/s  {report.tokens / fast:,.0f} to {report.tokens / slow:,.0f}",
            f"  MFU       {100 * found.mfu_overlapped:.1f} % to {100 * found.mfu_serial:.1f} %",
            f"  compute   {duration(found.compute_s)}, of which HBM traffic alone would take {duration(found.hbm_s)}",
            f"  network   {along or 'nothing to send'}",
            "  assumes",
            *(f"    {text}" for text in found.assumptions),
        )
    )
