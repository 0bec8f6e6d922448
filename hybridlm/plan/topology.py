"""Names of devices and slices, such as `v5p:8x8x16`, and meshes of them that exist for tracing alone."""

import math
import re
from dataclasses import dataclass

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.sharding import MESH_AXES, mesh_shape


@dataclass(frozen=True)
class Chip:
    """A kind of device, as JAX names it."""

    platform: str
    device_kind: str
    num_cores: int | None = None
    devices_per_chip: int = 1
    """How many devices JAX sees on one chip."""


CHIPS = {
    "cpu": Chip("cpu", "cpu"),
    "v4": Chip("tpu", "TPU v4", 1, devices_per_chip=2),
    "v5e": Chip("tpu", "TPU v5 lite", 1),
    "v5p": Chip("tpu", "TPU v5", 2),
    "v6e": Chip("tpu", "TPU v6 lite", 1),
    "tpu7x": Chip("tpu", "TPU7x", 1, devices_per_chip=2),
    "a100": Chip("gpu", "NVIDIA A100"),
    "h100": Chip("gpu", "NVIDIA H100"),
    "h200": Chip("gpu", "NVIDIA H200"),
    "b200": Chip("gpu", "NVIDIA B200"),
}


@dataclass(frozen=True)
class Topology:
    """`num_devices` of a chip."""

    chip: Chip
    num_devices: int

    def mesh(self, mesh: config.Mesh) -> AbstractMesh:
        """The run's mesh on these devices. Raises ConfigError where its sizes do not multiply to their number."""
        shape = mesh_shape(mesh, self.num_devices)
        device = AbstractDevice(self.chip.device_kind, self.chip.num_cores, self.chip.platform)
        kinds = (AxisType.Explicit,) * len(shape)
        return AbstractMesh(shape, MESH_AXES, axis_types=kinds, abstract_device=device)


def topology(name: str) -> Topology:
    """`v5e` is one chip, `v5e:4x4` a slice of 16, `h200:8` eight GPUs. Raises ConfigError for what is none of these."""
    kind, _, dims = name.lower().partition(":")
    if kind not in CHIPS:
        raise ConfigError("--topology", f"={name}: no such device; known are {', '.join(CHIPS)}")
    if dims and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
        raise ConfigError("--topology", f"={name}: after the colon come numbers of chips, as in {kind}:2x2")
    chip = CHIPS[kind]
    return Topology(chip, chip.devices_per_chip * math.prod(int(size) for size in dims.split("x")) if dims else 1)
