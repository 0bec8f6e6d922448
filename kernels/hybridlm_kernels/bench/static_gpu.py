"""What the compiler says of our GPU kernels, with no GPU: compile for an absent H200, read ptxas' report.

    for kernel in analyze(function, operands):
        print(kernel)

It shows whether a kernel compiles for sm_90a, its registers, spills and shared memory, and how many of its warpgroups
fit on a multiprocessor. It shows no time. Needs the CUDA plugin of JAX and the ptxas of the nvidia-cuda-nvcc wheel.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150754820096
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 patch: 0 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H200"
"""
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
INSTALL = "JAX's CUDA plugin, which brings the GPU compiler, is not installed; pip install 'jax[cuda13]'"
REGISTERS, SHARED_BYTES, THREADS = 65536, 233472, 2048  # of a multiprocessor
RESERVED_BYTES = 1024  # of shared memory, for each block of threads
LAUNCH = re.compile(
    r"blocks in \(%c(\d+)\w*, %c(\d+)\w*, %c(\d+)\w*\) threads in \(%c(\d+).*dynamic_shared_memory_size %c(\d+)"
)


class StaticGpuError(RuntimeError):
    """Nothing can be said of the kernels here."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic GPU kernel as compiled. Bytes of spills are stores and loads together."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int

    @property
    def per_multiprocessor(self) -> int:
        """Blocks of threads that fit on a multiprocessor at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are handed out in units of 256
        of_registers = REGISTERS // (per_warp * self.threads // 32)
        return min(of_registers, SHARED_BYTES // (self.shared_bytes + RESERVED_BYTES), THREADS // self.threads)

    def __str__(self) -> str:
        return (
            f"{self.name}: grid {'x'.join(map(str, self.grid))}, {self.threads} threads, {self.registers} registers, "
            f"{self.spilled_bytes} bytes spilled, {self.shared_bytes / 1024:.1f} KiB of shared memory, "
            f"{self.per_multiprocessor} per multiprocessor"
        )


def missing() -> str | None:
    """Why nothing can be compiled for a GPU here, or None."""
    return None if any(map(importlib.util.find_spec, PLUGINS)) else INSTALL


def absent_h200() -> Mesh:
    """A mesh of one H200 that is not there. Raises StaticGpuError without the CUDA plugin."""
    if reason := missing():
        raise StaticGpuError(reason)
    topology = topologies.get_topology_desc("h200_1x1x1", platform="cuda", target_config=H200, topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("x",))


def analyze(function: Callable[..., Any], operands: Sequence[Any]) -> list[Kernel]:
    """The Mosaic GPU kernels of `function(*operands)`, arrays or `jax.ShapeDtypeStruct`s, in the order of the program.

    Raises StaticGpuError where the program has none, and whatever the compiler raises where it does not compile.
    """
    mesh = absent_h200()
    replicated = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tuple(operands))
    with tempfile.TemporaryDirectory() as directory, dumping(directory), jax.set_mesh(mesh):
        lowered = jax.jit(lambda *args: function(*args)).lower(*placed)
        with warnings.catch_warnings():  # what is compiled for an absent GPU cannot be read back
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache")
            text = lowered.compile(compiler_options={"xla_dump_to": directory}).as_text() or ""
        reports = sorted(Path(directory).glob("*.ptxas"), key=lambda path: int(path.stem.rpartition("_")[2]))
        compiled = [read_kernel(report) for report in reports]
    program = re.findall(r'"mosaic_gpu_v2".*?kernel_hash = "((?:[^"\\]|\\.)*)"', text)
    if not program:
        raise StaticGpuError("the program has no Mosaic GPU kernel")
    fresh = [key for key in dict.fromkeys(program) if key not in _compiled]
    if len(fresh) != len(compiled):
        raise StaticGpuError(f"{len(fresh)} kernels were to be compiled, and {len(compiled)} reports were found")
    _compiled.update(zip(fresh, compiled, strict=True))
    return [_compiled[key] for key in program]


_compiled: dict[str, Kernel] = {}  # by hash: within a process a kernel is compiled, and reported on, but once


@contextlib.contextmanager
def dumping(directory: str) -> Iterator[None]:
    """Within, Mosaic GPU leaves what it compiles in `directory`; only its environment variables ask for it."""
    asked = {"MOSAIC_GPU_DUMP_TO": directory, "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def read_kernel(report: Path) -> Kernel:
    """A kernel from ptxas' report; its launch stands in the log of compiler passes beside it."""
    text = report.read_text()
    launch = LAUNCH.search(report.with_name(report.stem + ".mlir-passes.log").read_text())
    name = re.search(r"entry function '(\w+)'", text)
    registers = re.search(r"Used (\d+) registers", text)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    if launch is None or name is None or registers is None or spills is None:
        raise StaticGpuError(f"ptxas' report has another form than expected:\n{text}")
    x, y, z, threads, shared = map(int, launch.groups())
    spilled = sum(map(int, spills.groups()))
    short = name[1].removesuffix("_mosaic_gpu_kernel")
    return Kernel(short, (x, y, z), threads, int(registers[1]), spilled, shared)
