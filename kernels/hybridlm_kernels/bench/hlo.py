"""Reads a compiled TPU program (HLO text): which operations run, how often, and what each moves through HBM."""

import dataclasses
import math
import re

FREE = frozenset(  # nothing is scheduled for these, or it is scheduled elsewhere: a loop's cost is that of its body
    "parameter constant bitcast get-tuple-element tuple after-all while conditional call partition-id replica-id "
    "copy-done slice-done async-done async-update custom-call-done opt-barrier domain".split()
)
ASYNCHRONOUS = frozenset({"copy-start", "slice-start", "async-start", "custom-call-start"})

_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z\-]*)\(([^)]*)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"(pred|[a-z]+)(\d*)\w*\[([\d,]*)\](\{[^}]*\})?")
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
                names = tuple(re.findall(r"%([\w.\-]+)", operands))
                current[name] = Instruction(name, result, opcode, names or (operands,), attributes, bool(root))
        self.entry = entry

    def operations(self) -> list[Operation]:
        """All that run, those of loop bodies as often as their loops."""
        return self._operations_of(self.entry, 1)

    def _operations_of(self, computation: str, runs: int) -> list[Operation]:
        found = []
        for i in self.computations[computation].values():
            if i.opcode == "while":
                trips = self._trips(i)
                self.unknown_loops += trips is None
                found += self._operations_of(_called(i, "body"), runs * (trips or 1))
            elif i.opcode == "call":
                found += self._operations_of(_called(i, "to_apply"), runs)
            elif i.opcode == "conditional":
                for branch in re.findall(r"%([\w.\-]+)", i.attributes.split("metadata=")[0]):
                    found += self._operations_of(branch, runs)
            elif i.opcode not in FREE:
                is_pallas = 'custom_call_target="tpu_custom_call"' in i.attributes
                moved = self.hbm_bytes(computation, i)
                found.append(Operation(i.name, i.opcode, is_pallas, runs, moved, self._likeness(computation, i)))
        return found

    def _trips(self, loop: Instruction) -> int | None:
        """From the compiler's note, or the only constant that the loop's condition compares with."""
        if noted := re.search(r"known_trip_count\D+(\d+)", loop.attributes):
            return int(noted.group(1))
        condition = self.computations[_called(loop, "condition")].values()
        bounds = [i.operands[0] for i in condition if i.opcode == "constant"]
        return int(bounds[0]) if len(bounds) == 1 and bounds[0].isdigit() else None

    def hbm_bytes(self, computation: str, i: Instruction) -> int:
        """Operands read and results written once, an operand given twice too. Of an array that is only sliced or
        updated, that part."""
        types = self.computations[computation]
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

    def _fusion_bytes(self, fusion: Instruction, types: dict[str, Instruction]) -> int:
        body = self.computations[_called(fusion, "calls")]
        total, updated = 0, 0
        for i in body.values():
            if i.opcode != "parameter":
                continue
            given = types[fusion.operands[int(i.operands[0])]].result
            uses = [user for user in body.values() if i.name in user.operands]
            if uses and all(_touches_a_part(user, i.name) for user in uses):
                parts = (body[u.operands[1]] if u.opcode == "dynamic-update-slice" else u for u in uses)
                total += sum(_size_if_in_hbm(given, part.result) for part in parts)
                updated += array_bytes(given) * any(u.opcode == "dynamic-update-slice" for u in uses)
            else:
                total += array_bytes(given)
        return total + max(0, array_bytes(fusion.result) - updated)  # an update in place writes its part alone

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
