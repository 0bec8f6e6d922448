"""The ways to judge implementations: on the device at hand, or compiled for one that is absent.

Each way has default shapes and yields rows, for a JSONL file, with the line that tells a person the same.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax

from hybridlm_kernels.bench import measure, peers, static_gpu
from hybridlm_kernels.bench import static_tpu as static
from hybridlm_kernels.bench.cases import Case, Shape, Workload
from hybridlm_kernels.bench.chips import Chip
from hybridlm_kernels.dispatch import PLATFORMS, UnsupportedKernel

Row = dict[str, Any]
Settings = Iterable[tuple[Shape, str]]  # shape and dtype


class Impossible(RuntimeError):
    """The device, the compiler or a package for this is not here."""


class WrongKernel(RuntimeError):
    """An implementation disagrees with the oracle."""


class Judge(Protocol):
    shapes: list[Shape]
    status: int
    """1 when something did not compile."""

    def rows(self, settings: Settings, passes: Sequence[str]) -> Iterator[tuple[Row, str]]: ...


class OnDevice:
    """Checks, then times. `platform` is "cpu", "gpu" or "tpu", or None for what JAX takes by itself.

    Raises Impossible when there is no such device, WrongKernel before anything of that shape is timed.
    """

    def __init__(self, case: Case, impls: list[str] | None, platform: str | None):
        if platform:
            jax.config.update("jax_platforms", {"gpu": "cuda"}.get(platform, platform))
        try:
            self.device = jax.devices()[0]
        except (RuntimeError, AssertionError) as error:  # JAX asserts that the CUDA plugin is installed
            raise Impossible(f"--device: no {platform} here: {(str(error) or 'no plugin').splitlines()[0]}") from None
        self.case, self.asked, self.status = case, impls, 0
        self.names = chosen(case, impls, self.device.platform)
        self.shapes = case.shapes[self.device.platform]

    def rows(self, settings: Settings, passes: Sequence[str]) -> Iterator[tuple[Row, str]]:
        for shape, dtype in settings:
            names = [name for name in self.names if self._serves(name, shape, dtype)]
            compared = [name for name in names if name not in self.case.yardsticks]
            errors = {name: measure.check(self.case, name, shape, dtype) for name in compared}
            for name, error in errors.items():
                print(f"{self.case.op} {name} {dtype}: {error}", flush=True)
            if wrong := [name for name, error in errors.items() if not error.acceptable]:
                raise WrongKernel(f"{self.case.op} {', '.join(wrong)}: wrong, see the errors above; nothing is timed")
            for which in passes:
                yield from self._timed([Workload(self.case.op, n, which, shape, dtype) for n in names], errors)

    def _serves(self, name: str, shape: Shape, dtype: str) -> bool:
        function, operands = Workload(self.case.op, name, "forward", shape, dtype).program()
        try:
            jax.eval_shape(function, *operands)
        except UnsupportedKernel as error:
            if self.asked:
                raise Impossible(f"--impl: {error}") from None
            print(f"without {error}")
            return False
        return True

    def _timed(self, workloads: list[Workload], errors: dict[str, measure.Errors]) -> Iterator[tuple[Row, str]]:
        first = workloads[0]
        floor = self.case.floor(first.shape, first.dtype, first.which)
        copy = measure.copy_bandwidth(floor)
        timings = measure.time_all(workloads)
        best = min(timing.median for timing in timings.values())
        for workload in workloads:
            timing, error = timings[workload.impl], errors.get(workload.impl)
            row = described(workload) | {
                "method": "measured",
                "device": self.device.device_kind,
                "relative_error": error and error.output,
                "gradient_error": error and error.gradient,
                "min_ms": 1e3 * timing.minimum,
                "median_ms": 1e3 * timing.median,
                "max_ms": 1e3 * timing.maximum,
                "compile_s": timing.compile_s,
                "gb_per_s": floor.hbm_bytes / timing.median / 1e9,
                "copy_gb_per_s": copy / 1e9,
                "share_of_copy": floor.hbm_bytes / timing.median / copy,
                "gflop_per_s": floor.flops / timing.median / 1e9,
                "over_best": timing.median / best,
            }
            yield (
                row,
                (
                    f"{workload}: {row['median_ms']:.3f} ms ({row['min_ms']:.3f} to {row['max_ms']:.3f}), "
                    f"{row['gb_per_s']:.1f} GB/s of what must move, {row['share_of_copy']:.0%} of a copy, "
                    f"{row['gflop_per_s']:.1f} GFLOP/s; {row['over_best']:.2f} x the fastest"
                ),
            )


class OnAbsentTpu:
    """Compiles for `chip` and reads its cost from the schedule. Raises Impossible without a TPU compiler."""

    def __init__(self, case: Case, impls: list[str] | None, chip: Chip):
        self.case, self.chip, self.status = case, chip, 0
        self.names = chosen(case, impls, "tpu")
        self.shapes = case.shapes["static"]

    def rows(self, settings: Settings, passes: Sequence[str]) -> Iterator[tuple[Row, str]]:
        workloads = [
            Workload(self.case.op, name, which, shape, dtype)
            for (shape, dtype), which, name in itertools.product(settings, passes, self.names)
        ]
        try:
            for workload, result in zip(workloads, static.analyze(workloads, self.chip), strict=True):
                row = described(workload) | {"method": "static", "device": self.chip.name}
                if isinstance(result, static.Failure):
                    self.status = 1
                    yield row | {"failure": result.reason}, f"{workload}: {result.reason}"
                else:
                    yield row | self._numbers(result), self._line(result)
        except static.StaticTpuError as error:
            raise Impossible(str(error)) from None

    def _numbers(self, report: static.Report) -> Row:
        ops = report.kernels or report.ops
        in_all = {
            "cycles": report.cycles,
            "estimate_cycles": report.estimate,
            "ratio": report.ratio,
            "estimate_ratio": report.estimate_ratio,
            "estimate_us": self.chip.microseconds(report.estimate),
            "hbm_bytes": report.hbm_bytes,
            "spills": sum(op.runs * op.spills for op in ops),
        }
        return ({} if report.is_partial else in_all) | {
            "floor_cycles": report.floor,
            "vmem_mib": max(op.vmem_bytes for op in ops) / 2**20,
            "kernels": {op.name: {"cycles": op.cycles, "slots": _rounded(op.slots)} for op in report.kernels},
            "compile_s": report.compile_s,
            "notes": list(report.notes),
        }

    def _line(self, report: static.Report) -> str:
        numbers = f"{report.floor:.0f} cycles at the floor, "
        if report.is_partial:
            numbers += "no estimate, because loops run as often as the data say"
        else:
            numbers += f"{report.cycles:.0f} scheduled: {report.ratio:.2f}; with the HBM traffic that it has "
            numbers += f"{report.estimate_ratio:.2f}"
        lines = [f"{report.workload} on {report.chip}: {numbers}"]
        for op in report.kernels:
            slots = "".join(f" {name} {share:.0%}" for name, share in op.slots.items() if share >= 0.05)
            lines.append(
                f"  {op.name}: {op.cycles:.0f} cycles,{slots}, VMEM {op.vmem_bytes / 2**20:.1f} MiB, "
                f"{op.spills:.0f} spills"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in report.notes)])


class OnAbsentGpu:
    """Registers, spills and shared memory of our GPU kernels, compiled for an absent GPU; no time.

    Raises Impossible without a GPU compiler.
    """

    def __init__(self, case: Case, impls: list[str] | None, model: str):
        if reason := static_gpu.missing():
            raise Impossible(f"--device: {reason.splitlines()[0]}")
        self.case, self.model, self.status = case, model, 0
        self.names = chosen(case, impls or ["pallas_gpu"], "gpu")
        self.shapes = case.shapes["static"]

    def rows(self, settings: Settings, passes: Sequence[str]) -> Iterator[tuple[Row, str]]:
        for (shape, dtype), which, name in itertools.product(settings, passes, self.names):
            workload = Workload(self.case.op, name, which, shape, dtype)
            row = described(workload) | {"method": "compiled", "device": self.model}
            try:
                with jax.set_mesh(static_gpu.absent_h200()):
                    function, operands = workload.program()
                kernels = static_gpu.analyze(function, operands)
            except (RuntimeError, ValueError) as error:  # of JAX, its compilers and ours
                self.status = 1
                yield row | {"failure": str(error)[:2000]}, f"{workload}: {error}"
            else:
                numbers = {
                    "registers": max(kernel.registers for kernel in kernels),
                    "spilled_bytes": sum(kernel.spilled_bytes for kernel in kernels),
                    "shared_kib": max(kernel.shared_bytes for kernel in kernels) / 1024,
                    "per_multiprocessor": min(kernel.per_multiprocessor for kernel in kernels),
                    "kernels": {kernel.name: dataclasses.asdict(kernel) for kernel in kernels},
                }
                yield row | numbers, "\n  ".join([str(workload), *map(str, kernels)])


def chosen(case: Case, asked: list[str] | None, platform: str) -> list[str]:
    """The implementations to run: those asked for, or all of this platform but `reference`, which is slow.

    A peer that is not installed is left out with a note. Raises Impossible when it was asked for.
    """
    platforms = PLATFORMS | peers.PLATFORMS
    names = []
    for name in asked or case.implementations():
        needs = peers.missing(name)
        if needs and asked:
            raise Impossible(f"--impl: {name} is not installed: {needs}")
        if needs:
            print(f"without {name}: {needs}")
        elif asked or (name != "reference" and platforms.get(name, platform) == platform):
            names.append(name)
    return names


def _rounded(shares: dict[str, float]) -> dict[str, float]:
    return {name: round(share, 3) for name, share in shares.items()}


def described(workload: Workload) -> Row:
    return {
        "op": workload.op,
        "impl": workload.impl,
        "pass": workload.which,
        "shape": list(workload.shape),
        "dtype": workload.dtype,
    }
