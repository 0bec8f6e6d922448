"""Reads the schedule that libtpu's low-level optimiser (LLO) dumps for one operation: cycles, slots, spills, VMEM.

The text is the VLIW schedule after register allocation and before delays are folded into bundles, where one bundle
takes one cycle, latency gaps included. A bundle counts as often as the loops around it run. Regions that are skipped
under a condition count as always executed. Waiting for memory is not in it: with every transfer hidden, this is the
time. libtpu documents none of these formats; `ScheduleError` says when one has changed.
"""

import dataclasses
import re
from collections.abc import Iterator

SPILLS = ("FILL", "SPILL")
"""Columns of the utilisation dump: the loads and stores that only move spilled registers."""
BRANCH_DELAY = 4  # bundles after a branch that still belong to its loop
PIPELINE_STAGES = 2  # the grid's software pipeline runs its loop this many times more than the grid has steps

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}\s*)?:[\s>]*\{(.*)$")
_BRANCH = re.compile(r"sbr\.rel \(!?%(\w+)\) target bundleno = (\d+)")
_COMPARE = re.compile(r"%(p\w+) = scmp\.\w+\.[su]32\.totalorder (?:\(.*?\), )?%(\w+), (-?\d+|%\w+)")
_SCALAR = re.compile(r"%(s\w+) = (sadd|smov|sphi)(?:\.[su]32)? (?:\(.*?\), )?([^;}]+)")
_VMEM = re.compile(r"space=vmem, size = 0x([0-9a-f]+), offset = (0x[0-9a-f]+|0), scoped, tag = '(\w*)(.*)")


class ScheduleError(ValueError):
    """The dump does not read as expected: another version of libtpu."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """Bundles `first` to `last` run `trips` times; None where the number is known only at run time."""

    first: int
    last: int
    trips: int | None


@dataclasses.dataclass(frozen=True)
class Schedule:
    """One execution of one operation."""

    cycles: float
    slots: dict[str, float]
    """Busy share of each slot class over `cycles`."""
    spills: float
    """Vector registers stored to and loaded from VMEM for want of registers."""
    vmem_bytes: int
    unhidden_bytes: int
    """Of transfers that no computation can overlap: blocks into the first step of a grid, and out of the last."""
    loops: tuple[Loop, ...]


def read_schedule(bundles: str, utilisation: str, allocations: str) -> Schedule:
    """From the texts of libtpu's passes `packed-bundles-post-ra`, `pre-delay_hlo-static-per-bundle-utilization` and
    `post-bundle-packing-post-ra`.

    Raises ScheduleError.
    """
    lines = [match.group(1) for match in map(_BUNDLE.match, bundles.splitlines()) if match]
    slots, capacity, used = _utilisation(utilisation)
    if not lines or len(used) != len(lines):
        raise ScheduleError(f"{len(lines)} bundles but {len(used)} rows of utilisation; libtpu's dump has changed")
    loops = find_loops(lines)
    runs = [1.0] * len(lines)
    for loop in loops:
        for i in range(loop.first, loop.last + 1):
            runs[i] *= loop.trips or 1
    cycles = sum(runs)
    operations = [sum(map(float.__mul__, runs, map(float, column))) for column in zip(*used, strict=True)]
    busy = {s: n / (cycles * c) for s, n, c in zip(slots, operations, capacity, strict=True)}
    spills = sum(operations[slots.index(name)] for name in SPILLS)
    buffers = [(int(size, 16), int(offset, 16), tag) for size, offset, *tag in _VMEM.findall(allocations)]
    blocks = sum(size // 2 for size, _, (first, rest) in buffers if rest.startswith(" window"))  # two buffers each
    return Schedule(cycles, busy, spills, max((s + o for s, o, _ in buffers), default=0), blocks, tuple(loops))


def find_loops(bundles: list[str]) -> list[Loop]:
    """The loops, outer before inner: every branch back to an earlier bundle closes one."""
    defined = {name: _Scalar(kind, *value.split("/*", 1)) for b in bundles for name, kind, value in _SCALAR.findall(b)}
    tests = {name: (value, bound) for b in bundles for name, value, bound in _COMPARE.findall(b)}
    spans = [(int(to), i, test) for i, b in enumerate(bundles) for test, to in _BRANCH.findall(b) if int(to) <= i]
    last = len(bundles) - 1
    loops = [
        Loop(first, min(end + BRANCH_DELAY, last), _trips(*tests[test], defined) if test in tests else None)
        for first, end, test in spans
    ]
    return sorted(loops, key=lambda loop: (loop.first, -loop.last))


@dataclasses.dataclass(frozen=True)
class _Scalar:
    """How a scalar register gets its value."""

    kind: str
    value: str
    comment: str = ""


def _trips(counter: str, bound: str, defined: dict[str, _Scalar]) -> int | None:
    """How often a loop runs that ends when its counter, start + step * trips, has reached `bound`."""
    end, step, start, pipelined = _constant(bound, defined), 1, 0, False
    for scalar in _definitions(counter, defined):
        pipelined |= "stage =" in scalar.comment
        if scalar.kind == "sadd" and (match := re.match(r"(-?\d+), ", scalar.value)):
            step = (int(match.group(1)) + 2**31) % 2**32 - 2**31  # printed without its sign
        if scalar.kind == "sphi":
            start = _constant(_names(scalar.value)[0], defined) or 0  # loops of both compilers start at 0
    if end is None or step == 0:
        return None
    trips = -(-(end - start) // step)
    if pipelined and trips > PIPELINE_STAGES:
        trips -= PIPELINE_STAGES
    return trips if trips > 0 else None


def _definitions(name: str, defined: dict[str, _Scalar]) -> Iterator[_Scalar]:
    """The chain of additions and copies from `name` back to the value that the loop's head receives."""
    for _ in range(6):
        if name not in defined:
            return
        yield (scalar := defined[name])
        names = _names(scalar.value)
        if scalar.kind == "sphi" or not names:
            return
        name = names[0]


def _constant(text: str, defined: dict[str, _Scalar]) -> int | None:
    for _ in range(6):
        if re.fullmatch(r"-?\d+", text):
            return int(text)
        scalar = defined.get(text.removeprefix("%"))
        if scalar is None or scalar.kind != "smov":
            return None
        text = scalar.value.strip()
    return None


def _names(text: str) -> list[str]:
    return re.findall(r"%(\w+)", text)


def _utilisation(text: str) -> tuple[list[str], list[int], list[list[int]]]:
    """The slot classes (older versions name a part as `VLOAD:FILL`), units of each, and how many every bundle uses."""
    head, found, rows = text.partition("== UTILIZATION:")
    lines = head.strip().splitlines() if found else []
    slots = [name.rpartition(":")[2] for name in re.findall(r"[A-Z:]+", lines[-2])] if len(lines) > 1 else []
    capacity = [int(n) for n in lines[-1].split()] if lines else []
    if len(capacity) != len(slots) or not set(SPILLS) <= set(slots):
        raise ScheduleError(f"slot classes {slots} with {len(capacity)} capacities; libtpu's dump has changed")
    return slots, capacity, [[int(n) for n in row.split()] for row in rows.strip().splitlines()]
