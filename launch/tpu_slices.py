"""What Google Cloud calls TPU slices, and of how many machines they are.

Sources: cloud.google.com/tpu/docs, its pages of v4, v5e, v5p, v6e and tpu7x, and
cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

import math
from dataclasses import dataclass

from hybridlm.config_check import ConfigError
from hybridlm.plan.topology import Topology


@dataclass(frozen=True)
class Kind:
    """A generation of TPUs."""

    num_dims: int
    gke_accelerator: str
    """Of the node label cloud.google.com/gke-tpu-accelerator."""
    accelerator_type: str
    """With a number behind it, an accelerator type: v5litepod-16."""
    counts_cores: bool
    """Whether that number counts TensorCores, two to a chip."""
    gcloud_type: str | None
    """Of `gcloud compute tpus`; None where slices are had through GKE alone."""
    runtime: str | None
    one_machine: tuple[tuple[int, ...], ...]
    """Shapes of slices that are a single machine. All others are of machines with four chips."""


FLAT = ((1, 1), (2, 2), (2, 4))
KINDS = {
    "v4": Kind(3, "tpu-v4-podslice", "v4", True, "v4", "tpu-ubuntu2204-base", ((2, 2, 1),)),
    "v5e": Kind(2, "tpu-v5-lite-podslice", "v5litepod", False, "v5litepod", "v2-alpha-tpuv5-lite", FLAT),
    "v5p": Kind(3, "tpu-v5p-slice", "v5p", True, "v5p", "v2-alpha-tpuv5", ((2, 2, 1),)),
    "v6e": Kind(2, "tpu-v6e-slice", "v6e", False, "v6e", "v2-alpha-tpuv6e", FLAT),
    "tpu7x": Kind(3, "tpu7x", "tpu7x", True, None, None, ((2, 2, 1),)),
}


@dataclass(frozen=True)
class Slice:
    """One slice of a run: `hosts` machines with `chips_per_host` chips each."""

    kind: Kind
    shape: str
    chips: int
    hosts: int
    chips_per_host: int

    @property
    def accelerator_type(self) -> str:
        return f"{self.kind.accelerator_type}-{self.chips * (2 if self.kind.counts_cores else 1)}"


def slice_of(where: Topology) -> Slice:
    """Raises ConfigError where `where` names no TPU slices."""
    if where.kind not in KINDS:
        raise ConfigError("--topology", f"={where.name}: is no TPU slice; known are {', '.join(KINDS)}")
    kind = KINDS[where.kind]
    chips, shape = math.prod(where.shape), "x".join(map(str, where.shape))
    if len(where.shape) != kind.num_dims:
        example = "4x4" if kind.num_dims == 2 else "2x2x1"
        raise ConfigError(
            "--topology", f"={where.name}: give all {kind.num_dims} sizes of a slice, as in {where.kind}:{example}"
        )
    if where.shape in kind.one_machine:
        return Slice(kind, shape, chips, 1, chips)
    if chips % 4:
        raise ConfigError("--topology", f"={where.name}: {chips} chips are no machines of 4; take a larger slice")
    return Slice(kind, shape, chips, chips // 4, 4)
