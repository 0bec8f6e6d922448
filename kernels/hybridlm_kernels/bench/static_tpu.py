"""Static cost of TPU programs, with no TPU: compile for an absent chip, read the compiler's schedule.

    workloads = [Workload("linear_scan", "pallas_tpu", "forward", (1, 8192, 2560), "bfloat16")]
    for result in analyze(workloads, CHIPS["v5e"]):
        print(result)

Compilation happens in a child process: libtpu reads its flags once, and its fatal errors end the process. The numbers
order variants of a kernel; they are not measured times. Contention for HBM, queues of transfers, bank conflicts of VMEM
and the interconnect are not in them.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from hybridlm_kernels.bench.chips import CHIPS, Chip
from hybridlm_kernels.bench.hlo import ASYNCHRONOUS, Operation, Program
from hybridlm_kernels.bench.schedule import Schedule, read_schedule

PASSES = {  # of the compiler, by what is read of them
    "bundles": "packed-bundles-post-ra",
    "utilisation": "pre-delay_hlo-static-per-bundle-utilization",
    "allocations": "post-bundle-packing-post-ra",
}
NOTHING = Schedule(cycles=0, slots={}, spills=0, vmem_bytes=0, unhidden_bytes=0, loops=())
INSTALL = "libtpu, which brings the TPU compiler, is not installed; pip install 'hybridlm[tpu]'"


class StaticTpuError(RuntimeError):
    """No estimate can be made here."""


@dataclasses.dataclass(frozen=True)
class OpCost:
    """One operation of a program; a Pallas kernel is one. Numbers are of one run."""

    name: str
    opcode: str
    is_pallas: bool
    runs: int
    cycles: float
    """Scheduled, as if no transfer were waited for; 0 for an asynchronous copy."""
    hbm_bytes: int
    spills: float
    vmem_bytes: int
    unhidden_bytes: int
    slots: dict[str, float]
    unknown_loops: int
    """Loops in it that count once because their number of runs is not known."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A compiled program on `chip`. `estimate` bounds its time from below: every operation takes its HBM traffic at
    full bandwidth, or its scheduled cycles and the transfers that cannot hide behind them, whichever is more."""

    workload: str
    chip: str
    cycles: float
    estimate: float
    floor: float
    hbm_bytes: int
    compile_s: float
    ops: tuple[OpCost, ...]
    notes: tuple[str, ...]
    is_partial: bool
    """A loop of the program, or of a kernel such as its grid, is counted once because its length is known at run time
    alone: the numbers are too small by an unknown factor."""

    @property
    def ratio(self) -> float:
        """Scheduled cycles over the floor, as if every transfer were hidden and none were superfluous."""
        return max(self.cycles, self.floor) / self.floor

    @property
    def estimate_ratio(self) -> float:
        """The same with the HBM traffic that the program really has."""
        return max(self.estimate, self.floor) / self.floor

    @property
    def kernels(self) -> tuple[OpCost, ...]:
        return tuple(op for op in self.ops if op.is_pallas)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A program that does not compile for `chip`, or whose schedule cannot be read."""

    workload: str
    chip: str
    reason: str


def analyze(workloads: Sequence[Any], chip: Chip, *, timeout_s: float = 900) -> Iterator[Report | Failure]:
    """A Report or a Failure for each `cases.Workload`, in order, as they are done; none may take over `timeout_s`.

    Raises StaticTpuError where there is no TPU compiler.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise StaticTpuError(INSTALL)
    done = 0
    while done < len(workloads):
        with tempfile.TemporaryDirectory(prefix="static_tpu_") as name:
            directory = Path(name)
            pending = [dataclasses.asdict(workload) for workload in workloads[done:]]
            request = {"chip": chip.name, "workloads": pending, "parent": os.getpid()}
            (directory / "request.json").write_text(json.dumps(request))
            child = _start(directory)
            try:
                for line in _lines(directory / "results.jsonl", child, timeout_s):
                    yield _from_json(line)
                    done += 1
            finally:
                timed_out = child.poll() is None
                child.kill()
                child.wait()
            if done < len(workloads):  # it died over the next one
                why = f"took longer than {timeout_s:.0f} s" if timed_out else _last_words(directory, child.returncode)
                yield Failure(str(workloads[done]), chip.name, why)
                done += 1


def _lines(path: Path, child: subprocess.Popen[bytes], timeout_s: float) -> Iterator[str]:
    """The lines of a file as `child` completes them, until it ends or completes none for `timeout_s`."""
    text, deadline = "", time.monotonic() + timeout_s
    with path.open() as file:
        while time.monotonic() < deadline:
            running = child.poll() is None
            text += file.read()
            *lines, text = text.split("\n")
            if lines:
                yield from lines
                deadline = time.monotonic() + timeout_s
            if not running:
                return
            time.sleep(0.05)


def _start(directory: Path) -> subprocess.Popen[bytes]:
    dumps = directory / "dumps"
    dumps.mkdir()
    (directory / "results.jsonl").touch()
    flags = {
        "xla_jf_dump_to": dumps,
        "xla_jf_dump_llo_text": "true",
        "xla_jf_emit_annotations": "true",  # comments that name the stages of the grid's pipeline
        "xla_jf_dump_llo_pass_label_regex": f".*({'|'.join(PASSES.values())}).*",  # of some 70, 50 MB a kernel
    }
    environment = os.environ | {
        "LIBTPU_INIT_ARGS": " ".join(
            [os.environ.get("LIBTPU_INIT_ARGS", ""), *(f"--{name}={value}" for name, value in flags.items())]
        ).strip(),
        "JAX_PLATFORMS": "cpu",  # the process itself runs nothing on a TPU, present or not
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is not compiled leaves no schedule
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-m", "hybridlm_kernels.bench.static_tpu", str(directory)]
    with (directory / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)


def _last_words(directory: Path, code: int) -> str:
    """The line of a crashed compiler's log that says why."""
    log = (directory / "log").read_text(errors="replace").splitlines()
    lines = [line for line in log if line.strip() and not re.match(r"[WIE]\d{4} ", line)]
    fatal = [line for line in lines if re.match(r"F\d{4} ", line)]
    return f"the compiler ended with code {code}: {((fatal or lines)[-1:] or ['no message'])[0][:300]}"


def _from_json(line: str) -> Report | Failure:
    fields = json.loads(line)
    if "reason" in fields:
        return Failure(**fields)
    return Report(**fields | {"ops": tuple(OpCost(**op) for op in fields["ops"]), "notes": tuple(fields["notes"])})


def _child(directory: Path) -> None:
    """Compiles what request.json names, one by one, and appends to results.jsonl."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    from hybridlm_kernels.bench.cases import Workload

    request = json.loads((directory / "request.json").read_text())
    chip = CHIPS[request["chip"]]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    with (directory / "results.jsonl").open("a") as results:
        for fields in request["workloads"]:
            if os.getppid() != request["parent"]:  # nobody waits for the rest
                return
            workload = Workload(**fields | {"shape": tuple(fields["shape"])})
            _write(results, _report(workload, chip, mesh, directory / "dumps"))


def _write(results: TextIO, result: Report | Failure) -> None:
    print(json.dumps(dataclasses.asdict(result)), file=results, flush=True)


def _report(workload: Any, chip: Chip, mesh: Any, dumps: Path) -> Report | Failure:
    import jax

    for path in dumps.iterdir():
        path.unlink()
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):  # kernels and dispatch take the chip from the mesh in scope
            function, operands = workload.program()
            jax.jit(function).lower(*map(_replicated, operands, [mesh] * len(operands))).compile()
    except Exception as error:  # reported, so that the other programs still get their turn
        return Failure(str(workload), chip.name, f"{type(error).__name__}: {error}"[:2000])
    compile_s = time.perf_counter() - start
    floor = workload.case.floor(workload.shape, workload.dtype, workload.which)
    (hlo,) = dumps.glob("*-TLP-hlo.txt")  # `compiled.as_text()` fails where jaxlib and libtpu differ in age
    program = Program(hlo.read_text())
    ops, notes = _costs(program, dumps)
    traffic = sum(op.runs * op.hbm_bytes for op in ops)
    in_turn = sum(op.runs * _least_cycles(op, chip) for op in ops if op.opcode not in ASYNCHRONOUS)
    return Report(
        workload=str(workload),
        chip=chip.name,
        cycles=sum(op.runs * op.cycles for op in ops),
        estimate=max(chip.cycles(traffic), in_turn),
        floor=chip.cycles(floor.hbm_bytes, floor.mxu_flops),
        hbm_bytes=traffic,
        compile_s=compile_s,
        ops=tuple(ops),
        notes=tuple(notes),
        is_partial=bool(program.unknown_loops) or any(op.opcode == "custom-call" and op.unknown_loops for op in ops),
    )


def _least_cycles(op: OpCost, chip: Chip) -> float:
    return max(op.cycles + chip.cycles(op.unhidden_bytes), chip.cycles(op.hbm_bytes))


def _replicated(operand: Any, mesh: Any) -> Any:
    import jax

    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(operand.shape, operand.dtype, sharding=sharding)


def _costs(program: Program, dumps: Path) -> tuple[list[OpCost], list[str]]:
    """Operations alike share one schedule, dumped under the name of one of them."""
    operations = program.operations()
    schedules = {op.likeness: read for op in operations if (read := _schedule_of(op.name, dumps))}
    costs, notes = [], []
    for op in operations:
        schedule = schedules.get(op.likeness)
        if schedule is None and op.opcode not in ASYNCHRONOUS:
            notes.append(f"{op.name} ({op.opcode}): no schedule, counted as its memory traffic alone")
        cost = _cost(op, schedule or NOTHING)
        if cost.unknown_loops:
            notes.append(f"{op.name} ({op.opcode}): {cost.unknown_loops} loops of unknown length, each counted once")
        costs.append(cost)
    if program.unknown_loops:
        notes.append(f"{program.unknown_loops} loops of unknown length, each counted once")
    return costs, notes


def _cost(op: Operation, schedule: Schedule) -> OpCost:
    return OpCost(
        name=op.name,
        opcode=op.opcode,
        is_pallas=op.is_pallas,
        runs=op.runs,
        cycles=schedule.cycles,
        hbm_bytes=op.hbm_bytes,
        spills=schedule.spills,
        vmem_bytes=schedule.vmem_bytes,
        unhidden_bytes=schedule.unhidden_bytes,
        slots={slot: share for slot, share in schedule.slots.items() if share},
        unknown_loops=sum(loop.trips is None for loop in schedule.loops),
    )


def _schedule_of(name: str, dumps: Path) -> Schedule | None:
    """From files named TIME-OPERATION-PASS NUMBER-PASS.txt."""
    texts = {}
    for part, label in PASSES.items():
        pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{re.escape(label)}\.txt")
        for path in filter(lambda path: pattern.fullmatch(path.name), dumps.iterdir()):
            texts[part] = path.read_text()
    return read_schedule(**texts) if len(texts) == len(PASSES) else None


if __name__ == "__main__":
    _child(Path(sys.argv[1]))
