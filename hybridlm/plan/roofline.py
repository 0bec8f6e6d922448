"""The shortest time that a compiled step can take on a kind of device, and the MFU that this would be.

Arithmetic and HBM: a part of the model takes the longer of its FLOPs at the peak rate and its bytes at the bandwidth of
HBM. Collectives of B bytes (`collectives.Collective.bytes`) among n devices, after "How to scale your model"
(jax-ml.github.io/scaling-book/sharding), whose formulas are those of closed rings:

    all-gather, reduce-scatter   B (n-1)/n / w     w: all links of a device along the dimensions that the group spans,
    all-reduce                   twice that           both directions of a closed ring, one of an open line
    all-to-all                   B n/4 / w         per dimension of n chips; the book's B is that of all n devices
    permute                      B / w             one link, one direction

Several groups side by side in one line of chips share its links. Behind a switch (GPUs) n/4 becomes (n-1)/n. Between
slices or nodes the same formulas hold with the bandwidth of the network; of a group which has several devices in each,
all carry their share of a gather or a reduction, and its time is the longer of the two networks'.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from hybridlm.plan.chips import Hardware
from hybridlm.plan.collectives import Collective
from hybridlm.plan.costs import Cost


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step. The truth lies between `overlapped` and `serial`, or above both."""

    compute_s: float
    """Of the parts of the model, each bound by its arithmetic or by its HBM traffic."""
    hbm_s: float
    """Of the HBM traffic alone."""
    collective_s: dict[str, float]
    """By the mesh axes that they go along, `data+fsdp`; the longest first."""
    step_s_overlapped: float
    """Compute, collectives within slices and collectives between slices all at once."""
    step_s_serial: float
    """One after the other."""
    mfu_overlapped: float
    mfu_serial: float
    assumptions: tuple[str, ...]


def estimate(
    costs: Mapping[str, Cost],
    collectives: Sequence[Collective],
    hardware: Hardware,
    model_flops: float,
    mesh: jax.sharding.Mesh,
) -> Estimate | None:
    """`model_flops`: of a step on one device, without what rematerialisation repeats. None for devices without rates.

    `mesh` tells where in a slice its devices lie, by their `coords` and `slice_index`.
    """
    if not (hardware.peak_flops and hardware.hbm_bandwidth and hardware.link_bandwidth):
        return None
    compute = sum(max(c.flops / hardware.peak_flops, c.hbm_bytes / hardware.hbm_bandwidth) for c in costs.values())
    ideal = model_flops / hardware.peak_flops
    compute = max(compute, ideal)  # kernels that do not tell their FLOPs are missing in the costs
    by_axes: dict[str, float] = defaultdict(float)
    by_network: dict[bool, float] = defaultdict(float)
    routes: dict[str, Route] = {}
    for c in collectives:
        key = "+".join(c.axes)
        if key not in routes:
            routes[key] = route(mesh, c.axes, hardware)
        seconds = c.runs * routes[key].seconds(c.kind, c.bytes)
        by_axes[key] += seconds
        by_network[routes[key].slices > 1] += seconds
    overlapped = max(compute, *by_network.values()) if by_network else compute
    serial = compute + sum(by_network.values())
    return Estimate(
        compute_s=compute,
        hbm_s=sum(c.hbm_bytes for c in costs.values()) / hardware.hbm_bandwidth,
        collective_s=dict(sorted(by_axes.items(), key=lambda item: -item[1])),
        step_s_overlapped=overlapped,
        step_s_serial=serial,
        mfu_overlapped=ideal / overlapped if overlapped else 0.0,
        mfu_serial=ideal / serial if serial else 0.0,
        assumptions=_assumptions(hardware, routes),
    )


@dataclass(frozen=True)
class Line:
    """One dimension of the torus, as far as a group of devices spans it."""

    chips: int
    link: float
    """Bytes per second to a neighbour in the group, one direction."""
    is_ring: bool

    @property
    def bandwidth(self) -> float:
        return self.link * (2 if self.is_ring else 1)


@dataclass(frozen=True)
class Route:
    """What connects the devices of a group: a network between its parts, and in each a switch or a torus."""

    slices: int
    """Or nodes; 1 where the group lies in one."""
    network: float
    switched: int
    """Devices of the group on one switch; 1 in a torus."""
    switch: float
    lines: tuple[Line, ...]
    chips: int
    """Of a torus that the group has in one slice."""
    cores: int
    """Devices of the group on one chip."""
    on_chip: float

    def seconds(self, kind: str, nbytes: float) -> float:
        """Of one collective. The networks work at the same time."""
        match kind:
            case "all-gather" | "reduce-scatter" | "collective-broadcast":
                return self._gather(nbytes)
            case "all-reduce":
                return 2 * self._gather(nbytes)
            case "all-to-all" | "ragged-all-to-all":
                return self._exchange(nbytes)
            case "collective-permute":
                slowest = min((line.link for line in self.lines), default=self.on_chip)
                inside = self.switch if self.switched > 1 else slowest
                return nbytes / (self.network if self.slices > 1 else inside)
        raise ValueError(f"no formula for the time of a collective of kind {kind!r}")

    def _gather(self, nbytes: float) -> float:
        links = sum(line.bandwidth for line in self.lines)
        times = [
            others_share(self.slices) * nbytes / (self.network * self.switched * self.chips * self.cores),
            others_share(self.switched) * nbytes / self.switch,
            # Each of a chip's devices fetches its share of what comes from other chips, and the rest from the others.
            others_share(self.chips) * nbytes / self.cores / links if self.lines else 0.0,
            others_share(self.cores) * nbytes / self.on_chip,
        ]
        return max(times)

    def _exchange(self, nbytes: float) -> float:
        inside = nbytes / self.slices
        return max(
            others_share(self.slices) * nbytes / self.network,
            others_share(self.switched) * inside / self.switch,
            others_share(self.cores) * inside / self.on_chip,
            *(inside * line.chips / 4 / line.bandwidth for line in self.lines),
        )

    def __str__(self) -> str:
        parts = [f"{self.slices} slices or nodes at {self.network / 1e9:g} GB/s"] if self.slices > 1 else []
        parts += [f"{self.switched} devices on a switch at {self.switch / 1e9:g} GB/s"] if self.switched > 1 else []
        for line in self.lines:
            shape = "in a ring" if line.is_ring else "in a line"
            parts.append(f"{line.chips} chips {shape} at {line.bandwidth / 1e9:g} GB/s")
        parts += [f"{self.cores} devices of a chip at {self.on_chip / 1e9:g} GB/s"] if self.cores > 1 else []
        return ", ".join(parts)


def route(mesh: jax.sharding.Mesh, axes: Sequence[str], hardware: Hardware) -> Route:
    """Of the group of devices along `axes` that the mesh's first device is in; the others are taken to be like it."""
    group = mesh.devices[tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)].ravel()
    parts = [_part(device, hardware) for device in group]
    near = [device for device, part in zip(group, parts, strict=True) if part == parts[0]]
    is_torus = hardware.torus_dims > 0
    cores = len({device.core_on_chip for device in near}) if is_torus else 1
    return Route(
        slices=len(set(parts)),
        network=hardware.network_bandwidth or math.inf,
        switched=1 if is_torus else len(near),
        switch=hardware.link_bandwidth or math.inf,
        lines=_lines(near, list(mesh.devices.flat), hardware) if is_torus else (),
        chips=len(near) // cores if is_torus else 1,
        cores=cores,
        on_chip=hardware.core_bandwidth or math.inf,
    )


def _part(device: Any, hardware: Hardware) -> Any:
    """The slice or node of a device."""
    if hardware.torus_dims:
        return getattr(device, "slice_index", 0)
    # Absent GPUs have coordinates: nodes first, then the GPU in the node.
    return tuple(device.coords[:-1]) if hasattr(device, "coords") else device.id // hardware.node_devices


def _lines(group: Sequence[Any], devices: Sequence[Any], hardware: Hardware) -> tuple[Line, ...]:
    extents = [max(device.coords[dim] for device in devices) + 1 for dim in range(hardware.torus_dims)]
    closes = [extent % hardware.ring_length == 0 for extent in extents]
    if hardware.torus_dims == 3:  # only whole cubes are connected by switches that close rings
        closes = [all(closes)] * 3
    lines = []
    for dim, extent in enumerate(extents):
        places = {device.coords[dim] for device in group}
        if len(places) > 1:
            sharing = (max(places) - min(places)) / (len(places) - 1)  # groups between whose chips others' chips lie
            is_ring = len(places) == extent and closes[dim]
            lines.append(Line(len(places), (hardware.link_bandwidth or math.inf) / sharing, is_ring))
    return tuple(lines)


def others_share(n: int) -> float:
    """The share of what n devices have that is with the others."""
    return (n - 1) / n


def _assumptions(hardware: Hardware, routes: Mapping[str, Route]) -> tuple[str, ...]:
    peak, bandwidth = (hardware.peak_flops or 0) / 1e12, (hardware.hbm_bandwidth or 0) / 1e9
    return (
        f"a part of the model takes the longer of its FLOPs at {peak:g} TFLOP/s and its HBM traffic at "
        f"{bandwidth:g} GB/s, the whole no less than the model's own FLOPs; elementwise arithmetic hides behind the "
        "traffic",
        "links and networks run at their full bandwidth; latencies, and what collectives on the same links cost each "
        "other, are not counted",
        "overlapped: compute, collectives within slices and those between slices all hide behind the longest; serial: "
        "none hides",
        "MFU counts the model's FLOPs without rematerialisation",
        *(f"{axes}: {found}" for axes, found in routes.items()),
    )
