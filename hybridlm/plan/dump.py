"""Compiling a step so that the compiler leaves behind what it made: its final program and where every buffer lies.

`Compiled.as_text` would give the program alone, of some TPU programs not even that (jaxlib cannot read back what a
newer libtpu wrote), and nothing at all of a program that is too large for its device. XLA's own dump, asked for in the
options of this one compilation, holds all of it on TPU, GPU and CPU, and changes nothing in the program.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (color [1-9]\d*, )?(.*):$", re.MULTILINE)
_VALUE = re.compile(r" value: <\d+ (.+?)(\{[\d,]*\})? (?:\(phi\) )?@\d+> \(size=(\d+),offset=(\d+)\): (.*)")
_STEP = re.compile(r"    \d+:(\S+)$")
_RANGE = re.compile(r"    (\S+?)(\{[\d,]*\}):(\d+)-(\d+)$")


@dataclass(frozen=True)
class Dump:
    """What is left of one compilation."""

    compiled: jax.stages.Compiled | None
    """None where the program does not fit into the device's memory."""
    hlo: str
    """The program as it runs, in the order of its schedule."""
    buffers: str
    """Every allocation with the values that lie in it."""
    live_ranges: str
    """The schedule, and from where to where in it each value is needed."""
    out_of_memory: str
    """The compiler's refusal of a program that does not fit, else empty."""


@dataclass(frozen=True)
class Value:
    """What an instruction writes: an array, or the addresses of a tuple's arrays."""

    instruction: str
    shape: str
    offset: int
    bytes: int
    start: int
    """The place in the schedule from which on it is there."""
    end: int
    """The place of its last reader."""


@dataclass(frozen=True)
class Allocation:
    """A range of the device's memory that a program holds from its start to its end."""

    bytes: int
    parameter: int | None
    """The number of the argument that it is."""
    values: tuple[Value, ...]
    """What lies in it, by time."""


def compile_and_dump(lowered: jax.stages.Lowered, compiler_options: Mapping[str, Any] | None = None) -> Dump:
    """Compile, and read what the compiler wrote; a program too large for the device's memory leaves a dump as well.

    A program found in JAX's compilation cache would leave none, so the cache is neither read nor written.
    Raises whatever else the compiler raises.
    """
    with tempfile.TemporaryDirectory(prefix="hybridlm_plan_") as name, _without_compilation_cache():
        compiled, refusal = None, ""
        options = {**(compiler_options or {}), "xla_dump_to": name, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if OUT_OF_MEMORY not in str(error):
                raise
            refusal = str(error)
        return Dump(
            compiled,
            hlo=_read(Path(name), "after_optimizations.txt"),
            buffers=_read(Path(name), "after_optimizations-buffer-assignment.txt"),
            live_ranges=_read(Path(name), "after_optimizations-live-range.txt"),
            out_of_memory=refusal,
        )


def schedule(dump: Dump) -> list[str]:
    """The instructions in the order in which they run, those of a loop's body once."""
    return [match.group(1) for line in dump.live_ranges.splitlines() if (match := _STEP.match(line))]


def allocations(dump: Dump) -> list[Allocation]:
    """Those in HBM, or in the memory of a GPU or a CPU; scratch of single computations is not among them."""
    ranges = {}
    for line in dump.live_ranges.splitlines():
        if match := _RANGE.match(line):
            ranges[match.group(1, 2)] = int(match.group(3)), int(match.group(4))
    found: list[Allocation] = []
    for text in re.split(r"^(?=allocation \d+:)", dump.buffers, flags=re.MULTILINE):
        match = _ALLOCATION.match(text)
        if match is None or match.group(2) or "thread-local" in match.group(3):  # a color is another memory: VMEM, SMEM
            continue
        argument = re.search(r"\bparameter (\d+)", match.group(3))
        values = []
        for name, index, size, offset, shape in _VALUE.findall(text):
            if lives := ranges.get((name, index or "{}")):
                values.append(Value(name, shape, int(offset), int(size), *lives))
        in_order = tuple(sorted(values, key=lambda value: (value.start, value.end)))
        found.append(Allocation(int(match.group(1)), int(argument.group(1)) if argument else None, in_order))
    return found


def _read(directory: Path, ending: str) -> str:
    """Of several programs the largest: beside a step the compiler may make small ones, to time candidates with."""
    paths = sorted(directory.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
    return paths[-1].read_text() if paths else ""


@contextlib.contextmanager
def _without_compilation_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX looks at the setting but once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
