"""Which collectives a compiled step runs: along which mesh axes, how many bytes, how often, for which part of a model.

Read from the program as it runs, so what XLA added, merged, split or rewrote is in it:

- TPU overlaps a collective with compute by spreading it over several fusions. One collective then stands in all of
  them, and counts where it starts.
- TPU writes a reduce-scatter as a fusion of an all-reduce and the slice of it that a device keeps.
- Between slices, TPU programs send to their hosts, which do the collective over the network. Such a program is that of
  one slice: its partition ids number the devices of that slice alone.
"""

import math
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hybridlm_kernels
import jax
from hybridlm_kernels.bench.hlo import Instruction, Program

import hybridlm
from hybridlm.plan.costs import scope_of
from hybridlm.plan.device_groups import Places

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
SEARCHED = 32
"""Instructions looked at for the name of a collective that has none."""
PACKAGES = tuple(f"{Path(package.__path__[0])}/" for package in (hybridlm, hybridlm_kernels))
"""Directories whose source lines tell a person what an instruction is for."""
_LAYERS = tuple(f"{PACKAGES[0]}{directory}/" for directory in ("mixers", "ffns", "model"))
_ARRAY = re.compile(r"((?:pred|[a-z]+)(\d*)\w*)\[([\d,]*)\]")
_HOST_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
Step = Callable[[str, Instruction], list[Instruction]]


@dataclass(frozen=True)
class Collective:
    """One that the step runs `runs` times."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which data moves; those of one device are left out."""
    dtype: str
    """That of the largest array, where several travel together."""
    bytes: int
    """Of a run, as one device has them: after an all-gather, before any other."""
    runs: int
    asynchronous: bool
    """Whether the device can compute meanwhile."""
    scope: str
    """The part of the model: `mixer/RGLRU`, `ffn/GeGLU`, `embedding`, `head`, `optimizer`, or empty."""
    source: str
    """`file.py:12`, or empty."""


def collectives(program: Program, mesh: jax.sharding.Mesh) -> list[Collective]:
    """In the order of the program. Those that move nothing from one device to another are left out."""
    places, names, found = Places(program, mesh), _Names(program), []
    for computation, operation, runs in program.scheduled():
        for where, i, kind in _inside(program, computation, operation):
            devices, axes = places.devices_and_axes(i)
            if not axes:
                continue
            sent = i.operands[:1] if kind == "ragged-all-to-all" or i.opcode == "send" else i.operands
            arrays = [_array(program.computations[where][name].result) for name in sent]
            scope, source = names.scope_and_source(computation, i, operation, kind)
            found.append(
                Collective(
                    kind=kind,
                    axes=axes,
                    dtype=max(arrays, key=lambda array: array[1])[0],
                    bytes=sum(size for _, size in arrays) * (devices if kind == "all-gather" else 1),
                    runs=runs,
                    asynchronous=_is_asynchronous(program, where, i, operation),
                    scope=scope,
                    source=source,
                )
            )
    return found


def _source(program: Program, i: Instruction) -> str:
    """The line of a layer; of functions that many layers share only where no layer calls them."""
    found = program.source(i, _LAYERS)
    return (found if found.startswith(_LAYERS) else program.source(i, PACKAGES)).rpartition("/")[2]


def _inside(
    program: Program, computation: str, i: Instruction, is_fused: bool = False
) -> Iterator[tuple[str, Instruction, str]]:
    """The collectives that an operation is or holds, with the computation that each stands in, and its kind."""
    if kind := _kind(program, computation, i, is_fused):
        yield computation, i, kind
    elif not i.opcode.endswith("-done"):
        for called in i.called:
            for j in program.computations[called].values():
                yield from _inside(program, called, j, is_fused=True)


def _kind(program: Program, computation: str, i: Instruction, is_fused: bool) -> str | None:
    if i.opcode == "send":
        transfer = _HOST_TRANSFER.search(i.attributes)
        name = transfer.group(1).lower().replace("_", "-") if transfer else None
        return "collective-permute" if name == "one-to-one" else name
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS or _continued(program, computation, i):
        return None
    users = [j.opcode for j in program.computations[computation].values() if i.name in j.operands]
    return "reduce-scatter" if kind == "all-reduce" and is_fused and users == ["dynamic-slice"] else kind


def _starts(program: Program, computation: str) -> bool:
    return any('"AsyncCollectiveStart"' in j.attributes for j in program.computations[computation].values())


def _is_asynchronous(program: Program, computation: str, i: Instruction, operation: Instruction) -> bool:
    starts = i.opcode.endswith("-start") or operation.opcode in ("send", "async-start") or _starts(program, computation)
    return starts and '"is_sync":true' not in i.attributes + operation.attributes  # GPU starts all, and waits at once


class _Names:
    """What a collective is for: by its own name, or that of the fusion which holds it.

    XLA leaves out the names of some. Then it is what makes the data of a reduction, or what uses that of another one.
    """

    def __init__(self, program: Program):
        self._program = program
        self._users: dict[str, dict[str, list[Instruction]]] = {}

    def scope_and_source(self, computation: str, i: Instruction, operation: Instruction, kind: str) -> tuple[str, str]:
        named = next((j for j in (i, operation) if j.op_name), i)
        scope, source = scope_of(named.op_name) or "", _source(self._program, named)
        backward = kind in ("all-reduce", "reduce-scatter") or i.opcode == "send"
        if scope or (backward and source):  # a sum that has a name is one over several parts
            return scope, source
        other = self._nearby(computation, operation, self._makers if backward else self._users_of)
        return (
            ("", source) if other is None else (scope_of(other.op_name) or "", source or _source(self._program, other))
        )

    def _nearby(self, computation: str, operation: Instruction, step: Step) -> Instruction | None:
        near, seen, looked_at = deque([operation]), {operation.name}, 0
        while near and looked_at < SEARCHED:
            for j in step(computation, near.popleft()):
                if scope_of(j.op_name) and not _continues(self._program, j):
                    return j
                near += [j] if j.name not in seen else []
                seen.add(j.name)
                looked_at += j.opcode != "get-tuple-element"  # an asynchronous collective has some ten a fusion
        return None

    def _makers(self, computation: str, i: Instruction) -> list[Instruction]:
        """What its operands are; of what a loop carries, what the loop's body ends with."""
        body = self._program.computations[computation]
        # What SparseCores do is given its operands after it has started.
        given = [i, *(j for j in self._users_of(computation, i) if j.opcode == "async-update")]
        operands = [body[name] for j in given for name in j.operands if name in body and name != i.name]
        if i.opcode == "get-tuple-element" and operands and operands[0].opcode == "parameter":
            end = next(j for j in body.values() if j.is_root)
            return [body[end.operands[_index(i)]]] if end.opcode == "tuple" else []
        return operands

    def _users_of(self, computation: str, i: Instruction) -> list[Instruction]:
        if computation not in self._users:
            users = self._users[computation] = defaultdict(list)
            for j in self._program.computations[computation].values():
                for name in j.operands:
                    users[name].append(j)
        found = self._users[computation][i.name]
        # The first result of a fusion that continues a collective is that of the fusion's own work.
        return [j for j in found if _index(j) > 0] if _continues(self._program, i) and i.result[0] == "(" else found


def _index(i: Instruction) -> int:
    return int(i.attributes.partition("index=")[2].partition(",")[0] or 0)


def _continues(program: Program, i: Instruction) -> bool:
    """Whether it is a fusion that carries on a collective which another one has started."""
    bodies = [name for name in i.called if i.opcode == "fusion"]
    return any(_continued(program, name, j) for name in bodies for j in program.computations[name].values())


def _continued(program: Program, computation: str, i: Instruction) -> bool:
    return "async_collective_fusion_config" in i.attributes and not _starts(program, computation)


def _array(result: str) -> tuple[str, int]:
    """Data type and bytes of an array, wherever it lies."""
    match = _ARRAY.search(result)
    assert match, result
    bits = 8 if match.group(1) == "pred" else int(match.group(2))
    return match.group(1), math.prod(int(n) for n in match.group(3).split(",") if n) * bits // 8
