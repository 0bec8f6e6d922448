"""FLOPs and HBM traffic of a compiled step, by the part of the model that asks for them.

FLOPs are those of matrix products and convolutions, 2 for a multiply-add; a Pallas kernel's are what its author's
estimate says. Elementwise arithmetic counts nothing: on every accelerator it hides behind the traffic that it causes.
Traffic is every operand read once and every result written once, of an array that is only sliced or updated that part.
What a loop holds counts as often as the loop runs, what `conditional` holds as if all its branches ran.

The program is that of one device, and so are the numbers.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from hybridlm_kernels.bench.hlo import FREE_TARGETS, Instruction, Program

PARTS = ("mixer", "ffn")
"""Scopes that name the class of their part below them: `mixer/RGLRU`."""
SINGLE = ("embedding", "head", "optimizer")
OTHER = "other"
NEAR = 10
CROSSROADS = ("tuple", "while", "conditional", "parameter")
"""Where arrays of different parts meet."""

_DIMS = re.compile(r"\w+\[([\d,]*)\]")
_SCOPE = re.compile(rf"(?<![\w.\[\"'])(?:((?:{'|'.join(PARTS)})/\w+)|({'|'.join(SINGLE)})(?![\w.]))")
_MATMUL_LIBRARIES = ('custom_call_target="__cublas$', 'custom_call_target="__onednn$matmul')
_BOOKKEEPING = (*FREE_TARGETS, "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")


@dataclass(frozen=True)
class Cost:
    """Of one step on one device."""

    flops: float
    hbm_bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes)


def costs(program: Program) -> dict[str, Cost]:
    """By scope, the dearest in FLOPs first. What no scope names, such as copies that the compiler adds, belongs to whom
    it serves; what is left is `other`."""
    total: dict[str, Cost] = defaultdict(lambda: Cost(0.0, 0.0))
    scopes = Scopes(program)
    for computation, i, runs in program.scheduled():
        for where, j in _inside(program, computation, i):
            if flops := _flops(program, where, j):
                total[scope_of(j.op_name) or scopes.of(i)] += Cost(float(runs * flops), 0.0)
        moved = runs * program.hbm_bytes(computation, i)
        total[scopes.of(i)] += Cost(0.0, float(moved))
    return dict(sorted(total.items(), key=lambda item: (-item[1].flops, -item[1].hbm_bytes)))


def kernels_without_flops(program: Program) -> tuple[str, ...]:
    """Names of the custom calls whose FLOPs nobody tells; of these `costs` knows the traffic alone."""
    names = {
        i.op_name or i.name
        for computation, i, _ in program.scheduled()
        if i.opcode == "custom-call" and not _is_known(program, computation, i)
    }
    return tuple(sorted(names))


def scope_of(op_name: str) -> str | None:
    """`mixer/RGLRU`, `ffn/GeGLU`, `embedding`, `head` or `optimizer`, the innermost of those in an `op_name`.

    Transformations stand around a scope or a part of it, as in `transpose(jvp(mixer))/RGLRU/dot_general`.
    """
    path = re.sub(r"\bp?jit\([^()]*\)", "", op_name.partition(";")[0])
    found = _SCOPE.findall(re.sub(r"\w+\(|\)", "", path))
    return (found[-1][0] or found[-1][1]) if found else None


class Scopes:
    """To which part of the model the instructions of a program belong."""

    def __init__(self, program: Program):
        self._program = program
        self._instructions = {name: i for body in program.computations.values() for name, i in body.items()}
        self._readers: dict[str, list[str]] = defaultdict(list)
        for i in self._instructions.values():
            for name in i.operands:
                self._readers[name].append(i.name)
        self._telling: dict[str, Instruction | None] = {}

    def of(self, i: Instruction) -> str:
        """Its own scope, else that of its nearest reader that has one, else that of its nearest writer."""
        nearest = self.nearest_reader(i) or self.nearest_writer(i)
        return (scope_of(nearest.op_name) if nearest else None) or OTHER

    def nearest_reader(self, i: Instruction) -> Instruction | None:
        """Which has a scope; `i` itself, or one fused into it, where that has."""
        return self._nearest(i, lambda j: self._readers[j.name], self._with_scope)

    def nearest_writer(self, i: Instruction) -> Instruction | None:
        """Which has a scope; `i` itself, or one fused into it, where that has."""
        return self._nearest(i, lambda j: j.operands, self._with_scope)

    def nearest_argument(self, i: Instruction) -> Instruction | None:
        """Of the program, from which `i` is made."""
        return self._nearest(i, lambda j: j.operands, lambda j: j if j.opcode == "parameter" and j.op_name else None)

    def _nearest(
        self,
        i: Instruction,
        neighbours: Callable[[Instruction], Iterable[str]],
        tells: Callable[[Instruction], Instruction | None],
    ) -> Instruction | None:
        """Within a few steps: far away, everything serves everything."""
        seen, at = {i.name}, [i]
        for _ in range(NEAR + 1):
            if found := next(filter(None, map(tells, at)), None):
                return found
            names = [name for j in at if j is i or j.opcode not in CROSSROADS for name in neighbours(j)]
            fresh = [name for name in dict.fromkeys(names) if name in self._instructions and name not in seen]
            at = [self._instructions[name] for name in fresh]
            seen.update(fresh)
        return None

    def _with_scope(self, i: Instruction) -> Instruction | None:
        """It, or of what is fused into it a product, or else the last that has a scope."""
        if i.name not in self._telling:
            called = [j for name in i.called for j in self._program.computations[name].values()]
            products = [j for j in called if j.opcode in ("dot", "convolution")]
            candidates = (i, *reversed(products), *reversed(called))
            self._telling[i.name] = next((j for j in candidates if scope_of(j.op_name)), None)
        return self._telling[i.name]


def _inside(program: Program, computation: str, i: Instruction) -> list[tuple[str, Instruction]]:
    found = [(computation, i)]
    for called in i.called:
        for j in program.computations[called].values():
            found += _inside(program, called, j)
    return found


def _is_known(program: Program, computation: str, i: Instruction) -> bool:
    bookkeeping = any(f'custom_call_target="{target}"' in i.attributes for target in _BOOKKEEPING)
    return bookkeeping or _custom_call_flops(program, computation, i) is not None


def _flops(program: Program, computation: str, i: Instruction) -> int:
    match i.opcode:
        case "dot":
            return _dot_flops(program, computation, i)
        case "convolution":
            return _convolution_flops(program, computation, i)
        case "custom-call":
            return _custom_call_flops(program, computation, i) or 0
    return 0


def _dot_flops(program: Program, computation: str, i: Instruction) -> int:
    left = _dims(program.computations[computation][i.operands[0]].result)
    contracted = _numbers(i.attributes, r"lhs_contracting_dims=\{([\d,]*)\}")
    return 2 * math.prod(_dims(i.result)) * math.prod(left[n] for n in contracted)


def _custom_call_flops(program: Program, computation: str, i: Instruction) -> int | None:
    """From the estimate that a kernel carries, or the numbers of a library's matrix product; None without either."""
    if estimate := re.search(r'"cost_estimate":\{[^{}]*?"flops":"?(\d+)', i.attributes):
        return int(estimate.group(1))
    if any(library in i.attributes for library in _MATMUL_LIBRARIES):
        left = _dims(program.computations[computation][i.operands[0]].result)
        quoted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', i.attributes)
        if quoted:
            contracted = [left[int(n)] for n in re.findall(r"\d+", quoted.group(1))]
            return 2 * math.prod(_dims(i.result)) * math.prod(contracted)
    return None


def _convolution_flops(program: Program, computation: str, i: Instruction) -> int:
    """Products with padding do not count. A TPU writes batched matrix products as convolutions over the batch, most of
    whose positions are padding."""
    types = program.computations[computation]
    left, kernel = (_dims(types[name].result) for name in i.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, f"{i.name}: convolution without dim_labels"
    of_left, of_kernel, of_result = (dict(zip(word, itertools.count(), strict=False)) for word in labels.groups())
    result = _dims(i.result)
    products = left[of_left["b"]] * kernel[of_kernel["i"]] * kernel[of_kernel["o"]]
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    products //= int(groups.group(1)) if groups else 1
    for n, window in enumerate(_windows(i.attributes, len(labels.group(1)) - 2)):
        label = str(n)
        products *= window.products(left[of_left[label]], kernel[of_kernel[label]], result[of_result[label]])
    return 2 * products


@dataclass(frozen=True)
class Window:
    """How a kernel moves along one spatial dimension."""

    stride: int
    padding: int
    left_dilation: int
    kernel_dilation: int

    def products(self, left: int, kernel: int, result: int) -> int:
        """Pairs of a position in the result and one in the kernel that meet an element of the left operand.

        For an offset c of the kernel's, positions o with 0 <= o stride + c <= last and o stride + c = 0 modulo the
        dilation. Both sizes may be a batch's, so that pairs are not to be enumerated.
        """
        c = np.arange(kernel) * self.kernel_dilation - self.padding
        common = math.gcd(self.stride, self.left_dilation)
        period = self.left_dilation // common
        first = -(c // common) * pow(self.stride // common, -1, period) % period
        low = np.maximum(0, -(c // self.stride))
        high = np.minimum(result - 1, ((left - 1) * self.left_dilation - c) // self.stride)
        low += (first - low) % period
        return int(np.sum(np.maximum(0, (high - low) // period + 1), where=c % common == 0))


def _windows(attributes: str, count: int) -> list[Window]:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window.group(1).split()) if window else {}

    def values(name: str, default: int) -> list[int]:
        return [int(value.split("_")[0]) for value in fields[name].split("x")] if name in fields else [default] * count

    columns = (values("stride", 1), values("pad", 0), values("lhs_dilate", 1), values("rhs_dilate", 1))
    return [Window(*row) for row in zip(*columns, strict=True)]


def _dims(result: str) -> list[int]:
    """Of the first array that a type names."""
    found = _DIMS.search(result)
    return [int(n) for n in found.group(1).split(",") if n] if found else []


def _numbers(text: str, pattern: str) -> list[int]:
    found = re.search(pattern, text)
    return [int(n) for n in found.group(1).split(",") if n] if found else []
