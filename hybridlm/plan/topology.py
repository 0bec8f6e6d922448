"""Names of devices and slices, such as `v5p:8x8x16`, and those devices, which need not be there.

| Name | Devices |
|---|---|
| `v5p:8x8x16` | one TPU slice, by its chips along each axis of the torus |
| `v5e:16x16*4` | four such slices, connected by the data centre's network |
| `h200:8` | eight GPUs of one node |
| `h200:8*4` | four nodes of eight |
| `cpu:8` | eight devices that a CPU pretends to be |

A kind alone is one device for the tracer, and one chip for the compiler.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hybridlm import config
from hybridlm.config_check import ConfigError, suggestion
from hybridlm.plan.chips import HARDWARE
from hybridlm.plan.gpu_targets import GPUS
from hybridlm.sharding import MESH_AXES, mesh_shape
from hybridlm.train.capacity import share_of_host
from hybridlm.train.mesh_choice import chosen_mesh

GPUS_PER_NODE = 8
GPU_SHARE = 0.75
"""Of a GPU's memory that JAX takes when it starts, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


@dataclass(frozen=True)
class Chip:
    """A kind of device, as JAX names it."""

    platform: str
    device_kind: str
    num_cores: int | None = None
    devices_per_chip: int = 1
    """How many devices JAX sees on one chip."""
    torus_axes: int = 1
    most_chips: int = 4096
    """Of one slice."""


CHIPS = {
    "cpu": Chip("cpu", "cpu"),
    "v4": Chip("tpu", "TPU v4", 2, torus_axes=3, most_chips=4096),
    "v5e": Chip("tpu", "TPU v5 lite", 1, torus_axes=2, most_chips=256),
    "v5p": Chip("tpu", "TPU v5", 2, torus_axes=3, most_chips=8960),
    "v6e": Chip("tpu", "TPU v6 lite", 1, torus_axes=2, most_chips=256),
    "tpu7x": Chip("tpu", "TPU7x", 1, devices_per_chip=2, torus_axes=3, most_chips=9216),
    "a100": Chip("gpu", "NVIDIA A100", most_chips=GPUS_PER_NODE),
    "h100": Chip("gpu", "NVIDIA H100", most_chips=GPUS_PER_NODE),
    "h200": Chip("gpu", "NVIDIA H200", most_chips=GPUS_PER_NODE),
    "b200": Chip("gpu", "NVIDIA B200", most_chips=GPUS_PER_NODE),
}


COMPILERS = {
    "tpu": (("libtpu",), "libtpu, which brings the TPU compiler"),
    "cuda": (("jax_cuda12_plugin", "jax_cuda13_plugin"), "JAX's CUDA plugin"),
}
"""By JAX's name of a platform: the packages, one of which has it, and what to call them."""


@dataclass(frozen=True)
class Topology:
    """`num_slices` slices, or nodes, of chips of one kind."""

    kind: str
    shape: tuple[int, ...] = ()
    """Chips along each axis; empty is one device."""
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def name(self) -> str:
        dims = ":" + "x".join(map(str, self.shape)) if self.shape else ""
        return f"{self.kind}{dims}" + (f"*{self.num_slices}" if self.num_slices > 1 else "")

    @property
    def num_devices(self) -> int:
        if not self.shape:
            return self.num_slices
        return self.chip.devices_per_chip * math.prod(self.shape) * self.num_slices

    @property
    def memory(self) -> int | None:
        """Bytes that arrays and code may take on a device; those of a CPU share its memory. None where not known."""
        if self.chip.platform == "cpu":
            return share_of_host(self.num_devices)
        memory = HARDWARE[self.kind].hbm_bytes
        return int(GPU_SHARE * memory) if memory and self.chip.platform == "gpu" else memory

    def mesh_of(self, run: config.Config) -> config.Mesh:
        """The sizes of the run's mesh on these devices: its own, or what `sharding.auto` chooses.

        Raises ConfigError where there are none to choose.
        """
        return chosen_mesh(run, self.num_devices, self._tpu_slices, self.memory)

    def abstract_mesh(self, mesh: config.Mesh) -> AbstractMesh:
        """These devices in a mesh of such sizes, to trace for.

        Raises ConfigError where they do not multiply to their number.
        """
        shape = mesh_shape(mesh, self.num_devices, self._tpu_slices)
        device = AbstractDevice(self.chip.device_kind, self.chip.num_cores, self.chip.platform)
        kinds = (AxisType.Explicit,) * len(shape)
        return AbstractMesh(shape, MESH_AXES, axis_types=kinds, abstract_device=device)

    @property
    def _tpu_slices(self) -> int:
        """As JAX counts them: nodes of GPUs are none."""
        return self.num_slices if self.chip.platform == "tpu" else 1

    def devices(self) -> list[Any]:
        """The compiler's devices: absent TPUs or GPUs, or those of this process for `cpu`.

        Raises ConfigError where the compiler for them is not installed.
        """
        match self.chip.platform:
            case "tpu":
                return self._tpus()
            case "gpu":
                return self._gpus()
        return _cpus(self.num_devices)

    def _tpus(self) -> list[Any]:
        dims = "x".join(map(str, self.shape or (1,) * self.chip.torus_axes))
        # Without its torus the compiler gathers by all-reduces, which move twice as much.
        described_by: dict[str, Any] = {"wrap": self.wraps()} if any(self.wraps()) else {}
        if self.kind == "v4":
            described_by["chip_config_name"] = "megacore"  # both cores of a chip as one device, as they are by default
        if self.num_slices > 1:
            described_by["num_slices"] = self.num_slices
        return self._described("tpu", f"{self.kind}:{dims}", **described_by)[: self.num_devices]

    def _gpus(self) -> list[Any]:
        shape = f"{self.num_slices}x1x{self.num_devices // self.num_slices}"
        return self._described("cuda", f"{self.kind}_{shape}", target_config=GPUS[self.kind].target(), topology=shape)

    def _described(self, platform: str, name: str, **described_by: Any) -> list[Any]:
        packages, needs = COMPILERS[platform]
        if not any(map(importlib.util.find_spec, packages)):
            raise ConfigError("--topology", f"={self.name}: needs {needs}: pip install 'hybridlm[{platform}]'")
        try:
            return list(topologies.get_topology_desc(name, platform, **described_by).devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError("--topology", f"={self.name}: the compiler refuses it: {reason}") from None

    def wraps(self) -> tuple[bool, ...]:
        """Along which axes of a TPU slice the last chip is connected to the first.

        Cubes of 4x4x4 chips close each axis into a ring through optical switches; in two dimensions the whole pod has
        rings, 16 chips long.
        """
        if self.chip.torus_axes == 3:
            whole_cubes = all(side % 4 == 0 for side in self.shape)
            return (bool(self.shape) and whole_cubes,) * 3
        return (*(side == 16 for side in self.shape), *[False] * (3 - len(self.shape)))

    def larger(self) -> "Topology | None":
        """The next larger slice, another slice where there is none, None for a CPU."""
        if self.chip.platform == "cpu":
            return None
        chips = math.prod(self.shape or (1,))
        known = [shape for shape in shapes(self.kind) if math.prod(shape) >= max(2, 2 * chips)]
        if known:
            return replace(self, shape=min(known, key=lambda shape: (math.prod(shape), max(shape))))
        return replace(self, num_slices=2 * self.num_slices)


def topology(name: str) -> Topology:
    """The devices that `name` means; see the module. Raises ConfigError for what is none."""
    kind, _, rest = name.lower().partition(":")
    dims, times, slices = rest.partition("*")
    if kind not in CHIPS:
        known = f"; known are {', '.join(CHIPS)}"
        raise ConfigError("--topology", f"={name}: no such device{suggestion(kind, CHIPS) or known}")
    example = {1: f"{kind}:8", 2: f"{kind}:4x4", 3: f"{kind}:4x4x4"}[CHIPS[kind].torus_axes]
    if not rest:
        return Topology(kind)
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) or (times and not re.fullmatch(r"[1-9]\d*", slices)):
        raise ConfigError(
            "--topology",
            f"={name}: after the colon come numbers of chips, as in {example}, or {example}*2 for two",
        )
    shape = tuple(int(size) for size in dims.split("x"))
    found = Topology(kind, shape, int(slices) if times else 1)
    if CHIPS[kind].platform != "cpu" and shape not in shapes(kind):
        near = [replace(found, shape=near).name for near in _nearest(shape, shapes(kind))]
        raise ConfigError("--topology", f"={name}: no {_unit(kind)} has that shape; try {' or '.join(near)}")
    if CHIPS[kind].platform == "cpu" and len(shape) > 1:
        raise ConfigError("--topology", f"={name}: a CPU has no shape; {kind}:{math.prod(shape)} has as many devices")
    return found


@cache
def shapes(kind: str) -> tuple[tuple[int, ...], ...]:
    """Of the slices that can be rented, in chips; nodes of GPUs likewise. Smallest first.

    Google Cloud's lists: v5e and v6e slices double from 1 to 256 chips; in three dimensions a slice is a part of a cube
    of 4x4x4 chips, or of whole cubes, with its shorter sides first.
    """
    chip = CHIPS[kind]
    match chip.torus_axes:
        case 1:
            found = [(2**n,) for n in range(GPUS_PER_NODE.bit_length())]
        case 2:
            found = [(2**n, 2**m) for n in range(5) for m in (n, n + 1) if m < 5 and (n, m) != (0, 1)]
        case _:
            sides = range(4, 33, 4)
            cubes = [(a, b, c) for a in sides for b in sides for c in sides if a <= b <= c]
            found = [(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes]
    return tuple(sorted((s for s in found if math.prod(s) <= chip.most_chips), key=lambda s: (math.prod(s), max(s))))


def _nearest(shape: Sequence[int], known: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of as many chips; or else the largest of `known` with fewer and the smallest with more; the most compact each."""
    chips = math.prod(shape)
    sizes = [math.prod(other) for other in known]
    near = {chips} & {*sizes} or {max((s for s in sizes if s < chips), default=sizes[0]),
                                  min((s for s in sizes if s > chips), default=sizes[-1])}  # fmt: skip
    return [known[sizes.index(size)] for size in sorted(near)]


def _unit(kind: str) -> str:
    return "node" if CHIPS[kind].platform == "gpu" else "slice"


def _cpus(number: int) -> list[Any]:
    present = jax.devices("cpu")
    if len(present) < number:
        raise ConfigError(
            "--topology",
            f"=cpu:{number}: there are {len(present)} CPU devices; set JAX_NUM_CPU_DEVICES={number}",
        )
    return present[:number]


def prepare_process(where: Topology) -> None:
    """Make this process ready to compile for devices that are absent; call it before JAX asks for its devices.

    It takes no accelerator, and libtpu asks no metadata server and complains of none.
    """
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # Of a host that is not there either; what is compiled for does not depend on it.
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(RuntimeError):  # JAX has started already: then its devices are those that there are
        jax.config.update("jax_platforms", "cpu")
        if where.chip.platform == "cpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", where.num_devices)
