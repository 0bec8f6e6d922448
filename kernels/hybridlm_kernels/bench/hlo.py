"""Reads a compiled program (HLO text): which operations run, how often, and what each moves through HBM."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

FREE = frozenset(  # nothing is scheduled for these, or it is scheduled elsewhere: a loop's cost is that of its body
    "parameter constant bitcast get-tuple-element tuple after-all while conditional call partition-id replica-id "
    "copy-done slice-done async-done async-update custom-call-done opt-barrier domain".split()
)
FREE_TARGETS = ("AllocateBuffer", "ConcatBitcast")
"""Custom calls that only give a name to memory."""
ASYNCHRONOUS = frozenset({"copy-start", "slice-start", "async-start", "custom-call-start"})

_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\(([^)]*)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(pred|[a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"')
_FRAME = re.compile(r"(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?\}")
_LOCATION = re.compile(r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+) ")
_FILE = re.compile(r'(\d+) "(.*)"$')
_PRIVATE = re.compile(r", (?:metadata|backend_config|frontend_attributes|sharding)=.*")


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    result: str
    """Its type with layout and memory space."""
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """JAX's name of what it computes, with the scopes around it; that of a parameter is its argument's."""
        named = _NAME.search(self.attributes)
        return named.group(1).replace("\\'", "'") if named else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, a loop's condition left out."""
        attributes = self.attributes.split("metadata=")[0]
        if self.opcode == "conditional":
            return tuple(re.findall(r"%([\w.\-]+)", attributes))
        named = re.findall(r"\b(?:calls|body|to_apply)=%([\w.\-]+)", attributes)
        several = re.search(r"\bcalled_computations=\{([^}]*)\}", attributes)  # of custom calls
        return (*named, *re.findall(r"%([\w.\-]+)", several.group(1))) if several else tuple(named)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction that the device spends time on."""

    name: str
    opcode: str
    is_pallas: bool
    runs: int
    hbm_bytes: int
    """Read and written in one run; arrays that the compiler keeps in VMEM are free."""
    likeness: str
    """Equal for operations that share one schedule."""


class Program:
    """The computations of an HLO module."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self.num_partitions = int(partitions.group(1)) if partitions else 1
        """Devices that run it together and that its collectives number."""
        self._frames = _frames(text)
        self._likenesses: dict[str, str] = {}
        self.unknown_loops = 0
        """Loops whose number of runs is not in the program: their bodies are counted once."""
        entry, current = "", {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self.computations[match.group(2)] = {}
                entry = match.group(2) if match.group(1) else entry
            elif match := _INSTRUCTION.match(line):
                root, name, result, opcode, operands, attributes = match.groups()
                names = tuple(_operand(current, *of) for of in re.findall(r"%([\w.\-]+)(?:#(\d+))?", operands))
                current[name] = Instruction(name, result, opcode, names or (operands,), attributes, bool(root))
        self.entry = entry

    def operations(self) -> list[Operation]:
        """All that run, those of loop bodies as often as their loops."""
        return [
            Operation(
                name=i.name,
                opcode=i.opcode,
                is_pallas='custom_call_target="tpu_custom_call"' in i.attributes,
                runs=runs,
                hbm_bytes=self.hbm_bytes(computation, i),
                likeness=self._likeness(computation, i),
            )
            for computation, i, runs in self.scheduled()
        ]

    def scheduled(self) -> Iterator[tuple[str, Instruction, int]]:
        """Each that the device spends time on, with the computation it stands in and how often it runs."""
        return self._scheduled_in(self.entry, 1)

    def _scheduled_in(self, computation: str, runs: int) -> Iterator[tuple[str, Instruction, int]]:
        for i in self.computations[computation].values():
            if i.opcode == "while":
                trips = self._trips(computation, i)
                self.unknown_loops += trips is None
                yield from self._scheduled_in(_called(i, "body"), runs * (trips or 1))
            elif i.opcode in ("call", "conditional"):
                for called in i.called:
                    yield from self._scheduled_in(called, runs)
            elif i.opcode not in FREE:
                yield computation, i, runs

    def source(self, i: Instruction, within: Sequence[str]) -> str:
        """`file.py:12` of the innermost call in a file below one of the directories `within`, else of the innermost
        one; empty where the program does not say."""
        if at := re.search(r'source_file="([^"]*)" source_line=(\d+)', i.attributes):
            return f"{at.group(1)}:{at.group(2)}"
        frame = re.search(r"\bstack_frame_id=(\d+)", i.attributes)
        calls = self._calls(int(frame.group(1))) if frame else []
        inside = [call for call in calls if call.startswith(tuple(within))]
        return (inside or calls or [""])[0]

    def _calls(self, frame: int) -> list[str]:
        """Innermost first."""
        calls = []
        while frame in self._frames:
            call, frame = self._frames[frame]
            calls.append(call)
        return calls

    def _trips(self, computation: str, loop: Instruction) -> int | None:
        """From the compiler's note, or the only constant that the loop's condition compares a counter with."""
        if noted := re.search(r"known_trip_count\D+(\d+)", loop.attributes):
            return int(noted.group(1))
        condition = self.computations[_called(loop, "condition")]
        bounds = [i.operands[0] for i in condition.values() if i.opcode == "constant"]
        if len(bounds) != 1 or not bounds[0].isdigit():
            return None
        return int(bounds[0]) - self._first_count(computation, loop, condition)

    def _first_count(self, computation: str, loop: Instruction, condition: dict[str, Instruction]) -> int:
        """0, but for a loop whose first turns the compiler has taken out of it."""
        indices = [
            re.search(r"index=(\d+)", i.attributes) for i in condition.values() if i.opcode == "get-tuple-element"
        ]
        types = self.computations[computation]
        start = types.get(loop.operands[0])
        if len(indices) != 1 or indices[0] is None or start is None or start.opcode != "tuple":
            return 0
        value = types.get(start.operands[int(indices[0].group(1))])
        while value is not None and value.opcode in ("copy", "bitcast"):
            value = types.get(value.operands[0])
        is_known = value is not None and value.opcode == "constant" and value.operands[0].isdigit()
        return int(value.operands[0]) if value is not None and is_known else 0

    def hbm_bytes(self, computation: str, i: Instruction) -> int:
        """Operands read and results written once, an operand given twice too. Of an array that is only sliced or
        updated, that part."""
        types = self.computations[computation]
        if i.opcode == "async-start" and (started := self._started(i)):
            return self.hbm_bytes(*started)
        if i.opcode == "custom-call" and any(f'custom_call_target="{name}"' in i.attributes for name in FREE_TARGETS):
            return 0
        if i.opcode in ASYNCHRONOUS:  # the result names both ends
            return array_bytes(i.result)
        if i.opcode == "fusion":
            return self._fusion_bytes(i, types)
        read = [array_bytes(types[name].result) for name in set(i.operands) if name in types]
        written = array_bytes(i.result)
        if i.opcode in ("slice", "dynamic-slice"):
            return written + (_size_if_in_hbm(types[i.operands[0]].result, i.result) if read else 0)
        if i.opcode == "dynamic-update-slice":
            return 2 * _size_if_in_hbm(i.result, types[i.operands[1]].result)
        return sum(read) + written

    def _started(self, i: Instruction) -> tuple[str, Instruction] | None:
        """The slice or update that an asynchronous operation wraps, if that is what it does."""
        parts = ("slice", "dynamic-slice", "dynamic-update-slice")
        wrapped = ((name, j) for name in i.called for j in self.computations[name].values() if j.opcode in parts)
        return next(wrapped, None)

    def _fusion_bytes(self, fusion: Instruction, types: dict[str, Instruction]) -> int:
        body = self.computations[_called(fusion, "calls")]
        carried = _carried_through(body)
        total, updated = 0, 0
        for i in body.values():
            if i.opcode != "parameter" or i.name in carried:
                continue
            given = types[fusion.operands[int(i.operands[0])]].result
            read, in_place = self._bytes_read(body, i.name, given)
            total += read
            updated += array_bytes(given) * in_place
        written = array_bytes(fusion.result)
        if carried:
            (root,) = (i for i in body.values() if i.is_root)
            ends = zip(_ARRAY.finditer(fusion.result), root.operands, strict=False)
            written = sum(array_bytes(array.group()) for array, name in ends if name not in carried)
        return total + max(0, written - updated)  # an update in place writes its part alone

    def _bytes_read(self, body: dict[str, Instruction], name: str, given: str) -> tuple[int, bool]:
        """Of an array of the type `given`, what a fusion's computation reads through `name`: parts, where it or the
        fusions in it slice or update no more; and whether they update it."""
        whole, total, updated = array_bytes(given), 0, False
        for user in body.values():
            if name not in user.operands:
                continue
            if _touches_a_part(user, name):
                updates = user.opcode == "dynamic-update-slice"
                part = body[user.operands[1]] if updates else user
                reads = [(_size_if_in_hbm(given, part.result), updates)]
            elif user.opcode == "bitcast":
                reads = [self._bytes_read(body, user.name, given)]
            elif user.opcode == "fusion":
                inner = self.computations[_called(user, "calls")]
                numbers = [str(n) for n, operand in enumerate(user.operands) if operand == name]
                parameters = [j for j in inner.values() if j.opcode == "parameter" and j.operands[0] in numbers]
                reads = [self._bytes_read(inner, j.name, given) for j in parameters]
            else:
                return whole, False
            total += sum(read for read, _ in reads)
            updated |= any(updates for _, updates in reads)
        return (min(total, whole), updated) if total else (whole, False)

    def _likeness(self, computation: str, i: Instruction) -> str:
        """The instruction without the names in it, and the computation it calls likewise."""
        types = self.computations[computation]
        operands = [types[name].result for name in i.operands if name in types]
        attributes = re.sub(r"%[\w.\-]+", "%", _PRIVATE.sub("", i.attributes))
        body = self._body_likeness(_called(i, "calls")) if "calls=" in i.attributes else ""
        return f"{i.result} {i.opcode}({', '.join(operands)}){attributes}{body}"

    def _body_likeness(self, computation: str) -> str:
        if computation not in self._likenesses:
            self._likenesses[computation] = self._spell_out(computation)
        return self._likenesses[computation]

    def _spell_out(self, computation: str) -> str:
        order = {name: str(n) for n, name in enumerate(self.computations[computation])}
        return ";".join(
            f"{i.result} {i.opcode}({','.join(order.get(name, name) for name in i.operands)})"
            + re.sub(r"%[\w.\-]+", "%", _PRIVATE.sub("", i.attributes))
            for i in self.computations[computation].values()
        )


def _carried_through(body: dict[str, Instruction]) -> set[str]:
    """The buffers that a fusion hands on untouched while a collective, started by another one, fills them."""
    moving = {name for name, i in body.items() if "async_collective_fusion_config" in i.attributes}
    if not moving or any('"AsyncCollectiveStart"' in i.attributes for i in body.values()):
        return set()
    ends = moving | {i.name for i in body.values() if i.is_root}
    users = {name: [user.name for user in body.values() if name in user.operands] for name in body}
    parameters = {name for name, i in body.items() if i.opcode == "parameter"}
    return moving | {name for name in parameters if all(user in ends for user in users[name])}


def _frames(text: str) -> dict[int, tuple[str, int]]:
    """The program's table of calls: where each stands, and the number of the call around it."""
    files = {n: name for n, name in _table(text, "FileNames", _FILE)}
    places = {n: f"{files[file]}:{line}" for n, file, line in _table(text, "FileLocations", _LOCATION)}
    frames = {int(n): (places[place], int(around or 0)) for n, place, around in _table(text, "StackFrames", _FRAME)}
    # XLA writes the number of the outer call plus one, so that the outermost call is in itself.
    shift = 1 if 1 in frames and frames[1][1] == 1 else 0
    return {n: (place, around - shift) for n, (place, around) in frames.items()}


def _table(text: str, title: str, row: re.Pattern[str]) -> list[tuple[str, ...]]:
    _, found, rest = text.partition(f"\n{title}\n")
    lines = rest[: rest.find("\n\n")].splitlines() if found else []
    return [match.groups() for line in lines if (match := row.match(line))]


def _operand(computation: dict[str, Instruction], name: str, index: str) -> str:
    """The name of an operand. Newer XLA writes an element of a tuple as `%name#1`, others as an instruction, which is
    put into the computation here."""
    if not index:
        return name
    element = f"{name}#{index}"
    if element not in computation:
        result = _elements(computation[name].result)[int(index)]
        computation[element] = Instruction(element, result, "get-tuple-element", (name,), f", index={index}", False)
    return element


def _elements(of_tuple: str) -> list[str]:
    """The types that a tuple's type is made of."""
    depth, parts = 0, [""]
    for c in re.sub(r"/\*.*?\*/", "", of_tuple)[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def array_bytes(types: str) -> int:
    """Bytes of the arrays in HBM that an HLO type names: `S(1)` in a layout is VMEM, other spaces are smaller."""
    return sum(_bytes(match) for match in _ARRAY.finditer(types) if "S(" not in (match.group(4) or ""))


def _bytes(match: re.Match[str]) -> int:
    bits = 8 if match.group(1) == "pred" else int(match.group(2) or 0)
    return math.prod(int(n) for n in match.group(3).split(",") if n) * bits // 8


def _size_if_in_hbm(whole: str, part: str) -> int:
    """Bytes of `part`, in whatever memory, when the array it is taken from or put into lies in HBM."""
    return sum(map(_bytes, _ARRAY.finditer(part))) if array_bytes(whole) else 0


def _touches_a_part(user: Instruction, name: str) -> bool:
    if user.opcode == "dynamic-update-slice":
        return user.operands[0] == name and name not in user.operands[1:]
    return user.opcode in ("slice", "dynamic-slice")


def _called(i: Instruction, attribute: str) -> str:
    match = re.search(attribute + r"=%([\w.\-]+)", i.attributes)
    assert match, f"{i.name}: {i.opcode} without {attribute}"
    return match.group(1)
