"""What the memory of one device holds in a compiled step, by kind, and the largest buffers with their source lines.

Arguments are counted from the abstract state and batch. What the step itself makes comes from the compiler's buffer
assignment, at the peak: the moment of the schedule at which the most bytes are in use. Of these, activations are what
the forward pass wrote and the backward pass still reads, the stacks that a scan leaves for its backward scan among
them. Everything else is temporary: gradients, holes between buffers, the padding of arguments, results that do not take
an argument's place.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import jax
from hybridlm_kernels.bench.hlo import Instruction, Program

from hybridlm.plan.collectives import PACKAGES
from hybridlm.plan.costs import CROSSROADS, Scopes
from hybridlm.plan.dump import Allocation, Dump, Value, allocations, schedule
from hybridlm.train.capacity import bytes_per_device

NUM_LARGEST = 10

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSAL = re.compile(r"\(([\d.]+[KMGT]?B?)\) exceeds available HBM \(([\d.]+[KMGT]?B?)\)")


@dataclass(frozen=True)
class Buffer:
    """An array, or several that lie in one place one after the other."""

    bytes: int
    """As it lies in memory: a TPU pads the last two dimensions to its tiles, often 8 x 128."""
    shape: str
    kind: str
    """`parameter`, `optimizer`, `batch`, `teacher`, `activation` or `temporary`."""
    op_name: str
    """JAX's name of what fills it, or of what reads it where the compiler fills it."""
    source: str
    """`file.py:12`"""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the step's peak. The kinds add up to `total`."""

    parameters: int
    optimizer: int
    """Its state, and the few counters of the training state."""
    batch: int
    activations: int
    temporaries: int
    code: int
    total: int
    largest: tuple[Buffer, ...]
    teacher: int = 0
    """Parameters that a student learns from."""


@dataclass(frozen=True)
class Overflow:
    """A program that the compiler refused because it needs more than the device has."""

    needed: int
    available: int
    largest: tuple[Buffer, ...]


def memory(dump: Dump, program: Program, state: Any, batch: Any, teacher: Any = None) -> Memory:
    """Of a step `(state, batch, teacher) -> ...`, given as pytrees of abstract arrays with their shardings;
    `state.params` are the parameters. Where the program did not fit, of the step as it would be, without its code."""
    found = allocations(dump)
    analysis = dump.compiled.memory_analysis() if dump.compiled else None
    code = analysis.generated_code_size_in_bytes if analysis else 0
    total = sum(allocation.bytes for allocation in found) + code
    parameters, given, of_batch, of_teacher = map(bytes_per_device, (state.params, state, batch, teacher))
    buffers = buffers_at_peak(dump, program, state, batch, teacher)
    activations = sum(buffer.bytes for buffer in buffers if buffer.kind == "activation")
    return Memory(
        parameters=parameters,
        optimizer=given - parameters,
        batch=of_batch,
        activations=activations,
        temporaries=total - given - of_batch - of_teacher - activations - code,
        code=code,
        total=total,
        largest=buffers[:NUM_LARGEST],
        teacher=of_teacher,
    )


def overflow(dump: Dump, program: Program, state: Any, batch: Any, teacher: Any = None) -> Overflow:
    """What the compiler's refusal of this step says, with the largest buffers that it would have had at its peak."""
    needed, available = read_refusal(dump.out_of_memory)
    return Overflow(needed, available, buffers_at_peak(dump, program, state, batch, teacher)[:NUM_LARGEST])


def read_refusal(text: str) -> tuple[int, int]:
    """Bytes that a program needs and that its device has, from the TPU compiler's error. Raises ValueError where it
    tells neither."""
    match = _REFUSAL.search(text)
    if match is None:
        raise ValueError(f"the compiler is out of memory, but does not say how much it needs: {text}")
    needed, available = map(_bytes, match.groups())
    return needed, available


def buffers_at_peak(dump: Dump, program: Program, state: Any, batch: Any, teacher: Any = None) -> tuple[Buffer, ...]:
    """All that are in use at the peak, arguments among them, the largest first."""
    found = allocations(dump)
    arguments = [allocation for allocation in found if allocation.parameter is not None]
    made = [allocation for allocation in found if allocation.parameter is None]
    reader = _Reader(program, schedule(dump))
    buffers = reader.arguments(arguments, _kinds(state, batch, teacher)) + reader.at_peak(made)
    return tuple(sorted(buffers, key=lambda buffer: -buffer.bytes))


class _Reader:
    """Knows what the values of a program are for."""

    def __init__(self, program: Program, schedule: list[str]):
        self.program = program
        self.schedule = schedule
        self.scopes = Scopes(program)
        self.instructions = {name: i for body in program.computations.values() for name, i in body.items()}
        forward = (time for time, name in enumerate(schedule) if _is_forward(self._op_name(name)))
        self.end_of_forward = max(forward, default=-1)

    def arguments(self, found: Iterable[Allocation], kinds: dict[str, str]) -> list[Buffer]:
        """Their kinds by what JAX calls them after the function's own name of the argument: `.params['w']`."""
        entry = self.program.computations[self.program.entry].values()
        names = {int(i.operands[0]): i for i in entry if i.opcode == "parameter"}
        buffers = []
        for allocation in found:
            assert allocation.parameter is not None
            i = names[allocation.parameter]
            kind = kinds.get(re.sub(r"^\w+", "", i.op_name), "temporary")
            buffers.append(Buffer(allocation.bytes, _plain_shape(i.result), kind, i.op_name, ""))
        return buffers

    def at_peak(self, found: Iterable[Allocation]) -> list[Buffer]:
        """What is in use of allocations that the step itself fills, when the most of them is."""
        slots: dict[tuple[int, int, int], list[Value]] = defaultdict(list)
        for number, allocation in enumerate(found):
            for value in allocation.values:
                slots[number, value.offset, value.bytes].append(value)
        peak = _peak(slots, len(self.schedule))
        arrays = [(size, self._array_at(values, peak)) for (_, _, size), values in slots.items()]
        return [self._buffer(size, held) for size, held in arrays if held]

    def _array_at(self, values: list[Value], time: int) -> list[Value]:
        """The values, one after another in one place, that make up the array which is there at `time`.

        An array stays what it is through loops and updates in place, until the backward pass writes another over it.
        """
        held: list[Value] = []
        for value in values:
            follows = bool(held) and value.start <= max(one.end for one in held)
            if not follows or _is_backward(self._op_name(value.instruction)):
                if _is_there(held, time):
                    return held
                held = []
            held.append(value)
        return held if _is_there(held, time) else []

    def _buffer(self, size: int, held: list[Value]) -> Buffer:
        last = max(value.end for value in held)
        reader = self.schedule[last] if last < len(self.schedule) else ""
        name = self._op_name(reader)
        is_read_back = _is_backward(name) or (not name and self.end_of_forward < last < len(self.schedule))
        written = [value for value in held if _is_forward(self._op_name(value.instruction))]
        is_activation = is_read_back and bool(written)
        names = [*(value.instruction for value in reversed(written or held)), reader]
        makers = [self.instructions[name] for name in names if name in self.instructions]
        named = self._named([i for i in makers if i.opcode not in CROSSROADS] or makers)
        return Buffer(
            bytes=size,
            shape=_plain_shape(max(held, key=lambda value: value.end).shape),
            kind="activation" if is_activation else "temporary",
            op_name=named.op_name,
            source=_short(self.program.source(named, PACKAGES)),
        )

    def _named(self, makers: list[Instruction]) -> Instruction:
        """The instruction that tells what an array is for. Those that fill it may tell nothing: a loop's, or XLA's own.
        Then one before or after them in a scope does, or an argument that they copy."""
        scopes = self.scopes
        for nearest in (scopes.nearest_writer, scopes.nearest_reader, _if_named, scopes.nearest_argument):
            if found := next((j for i in makers if (j := nearest(i))), None):
                return found
        return makers[0]

    def _op_name(self, name: str) -> str:
        i = self.instructions.get(name)
        return i.op_name if i else ""


def _peak(slots: dict[tuple[int, int, int], list[Value]], length: int) -> int:
    """The time at which the most bytes are in use; values in one place count once."""
    change = [0] * (length + 2)
    for (_, _, size), values in slots.items():
        end = -1
        for value in values:
            if value.end > end:
                change[max(value.start, end + 1)] += size
                change[value.end + 1] -= size
                end = value.end
    used = list(accumulate(change))
    return used.index(max(used))


def _is_there(held: list[Value], time: int) -> bool:
    return bool(held) and held[0].start <= time <= max(value.end for value in held)


def _if_named(i: Instruction) -> Instruction | None:
    return i if "/" in i.op_name else None


def _is_forward(op_name: str) -> bool:
    return "jvp(" in op_name and not _is_backward(op_name)


def _is_backward(op_name: str) -> bool:
    return "transpose(" in op_name


def _kinds(state: Any, batch: Any, teacher: Any) -> dict[str, str]:
    """Of each argument, by its path."""
    kinds = {
        jax.tree_util.keystr(path): kind
        for kind, tree in (("batch", batch), ("teacher", teacher))
        for path, _ in jax.tree.leaves_with_path(tree)
    }
    for path, _ in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        kinds[name] = "parameter" if name.startswith(".params") else "optimizer"
    return kinds


def _short(source: str) -> str:
    """Files of the packages by their path in it: `hybridlm/layers.py:12`."""
    roots = [f"{Path(package).parent}/" for package in PACKAGES if source.startswith(package)]
    return source.removeprefix(roots[0]) if roots else source


def _plain_shape(result: str) -> str:
    """Without the layout."""
    return re.sub(r"\{[^}]*\}", "", result)


def _bytes(text: str) -> int:
    """`15.75G` or `0B`."""
    number = text.rstrip("BKMGT")
    return round(float(number) * _UNITS[text[len(number) :][:1] or "B"])
