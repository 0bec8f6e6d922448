"""The device that code is traced for: not always one of this process, since a mesh may name a device that is absent."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

# Of the NVIDIA devices that a compilation target may name; that of a device at hand is asked for.
COMPUTE_CAPABILITIES = {
    "A100": 8.0, "A10": 8.6, "L4": 8.9, "L40": 8.9, "H100": 9.0, "H200": 9.0, "GH200": 9.0, "B200": 10.0, "GB200": 10.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """`platform` is "cpu", "gpu" or "tpu"; `kind` the device's own name."""

    platform: str
    kind: str
    compute_capability: float | None = None
    """Of an NVIDIA GPU; None where it is not known."""


def target_of(operands: Sequence[Any] = ()) -> Target:
    """The device of the operands' mesh, else of the mesh in scope, else the process's own."""
    meshes = [getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) for x in operands if x is not None]
    for mesh in [*meshes, jax.sharding.get_abstract_mesh()]:
        device = getattr(mesh, "abstract_device", None)
        if device is not None:
            return target(device.platform, device.device_kind)
    device = jax.local_devices()[0]
    return target(device.platform, device.device_kind, getattr(device, "compute_capability", None))


def target(platform: str, kind: str, compute_capability: str | None = None) -> Target:
    """Target of a device that JAX describes so."""
    if platform == "cpu":
        return Target("cpu", "CPU")
    if platform == "tpu":
        return Target("tpu", kind)
    if compute_capability is not None:
        return Target("gpu", kind, float(compute_capability))
    known = [COMPUTE_CAPABILITIES[word] for word in re.split("[ -]", kind) if word in COMPUTE_CAPABILITIES]
    return Target("gpu", kind, known[0] if known else None)
