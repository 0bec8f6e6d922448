"""What the devices that a run is planned for can do, from public numbers, per device as JAX counts them.

tpu7x shows two devices a chip, its cores: each has half the chip's memory, peak and links here. Sources:

- TPU peak rates: `hybridlm.flops.PEAK_FLOPS`. Memory, its bandwidth, the interconnect and the network between slices:
  cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x. The pages give a chip's links together and in both directions
  (v5e 400, v5p 1200, v6e 800, tpu7x 1200 GB/s); over 4 or 6 links and 2 directions they are 50, 100, 100 and 100 GB/s.
  v4's 45 GB/s is that of "How to scale your model" (jax-ml.github.io/scaling-book/tpus), where also stands which
  dimensions close into rings: of 16 chips on v5e and v6e, of whole cubes of 4 x 4 x 4 on the others.
- Network between slices: 50, 100 and 100 Gbit/s a chip on v5p, v6e and tpu7x, 25 on v5e (6.4 Tbit/s for 256 chips);
  the book's 25 GB/s a host of four chips on v4.
- GPUs: NVIDIA's data sheets of the A100 80GB, H100, H200 (all SXM) and B200 (HGX); NVLink 3, 4 and 5 carry 300, 450 and
  900 GB/s each way; DGX systems have one network adapter a GPU, of 200 Gbit/s (A100) or 400 Gbit/s.

Assumed: the cores of a tpu7x chip exchange data six times as fast as over one of its links.

The table of `hybridlm_kernels.bench.chips` answers another question with other numbers: what JAX tells a kernel of the
core that it runs on (one of v4's two; 2460 GB/s on v5p), and the clock that its cycles are counted by.

Rates are bytes and FLOPs per second, bandwidths those of one direction. A compiler keeps some of the memory to itself.
"""

from dataclasses import dataclass

from hybridlm.flops import PEAK_FLOPS

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One JAX device. None is what is not known."""

    hbm_bytes: int | None
    hbm_bandwidth: float | None
    peak_flops: float | None
    """bfloat16 matrix products."""
    link_bandwidth: float | None
    """Of one link to a neighbour in a torus; without a torus that of all links into the switch."""
    network_bandwidth: float | None
    """Between slices, or between nodes of GPUs."""
    torus_dims: int = 0
    """0 where all devices of a node are connected by a switch."""
    ring_length: int = 0
    """Dimensions of the torus of a multiple of this many chips close into rings; others are lines."""
    core_bandwidth: float | None = None
    """To the other device of the same chip, where JAX shows two."""
    node_devices: int = 8
    """Devices on one switch, where there is one."""


HARDWARE = {
    "cpu": Hardware(None, None, None, None, None),
    "v4": Hardware(
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1200 * GB,
        peak_flops=PEAK_FLOPS["TPU v4"],
        link_bandwidth=45 * GB,
        network_bandwidth=6.25 * GB,
        torus_dims=3,
        ring_length=4,
    ),
    "v5e": Hardware(
        hbm_bytes=16 * GIB,
        hbm_bandwidth=819 * GB,
        peak_flops=PEAK_FLOPS["TPU v5 lite"],
        link_bandwidth=50 * GB,
        network_bandwidth=3.125 * GB,
        torus_dims=2,
        ring_length=16,
    ),
    "v5p": Hardware(
        hbm_bytes=95 * GIB,
        hbm_bandwidth=2765 * GB,
        peak_flops=PEAK_FLOPS["TPU v5"],
        link_bandwidth=100 * GB,
        network_bandwidth=6.25 * GB,
        torus_dims=3,
        ring_length=4,
    ),
    "v6e": Hardware(
        hbm_bytes=32 * GIB,
        hbm_bandwidth=1638 * GB,
        peak_flops=PEAK_FLOPS["TPU v6 lite"],
        link_bandwidth=100 * GB,
        network_bandwidth=12.5 * GB,
        torus_dims=2,
        ring_length=16,
    ),
    "tpu7x": Hardware(
        hbm_bytes=96 * GIB,
        hbm_bandwidth=3690 * GB,
        peak_flops=PEAK_FLOPS["TPU7x"],
        link_bandwidth=50 * GB,
        network_bandwidth=6.25 * GB,
        torus_dims=3,
        ring_length=4,
        core_bandwidth=600 * GB,
    ),
    "a100": Hardware(80 * GIB, 2039 * GB, PEAK_FLOPS["NVIDIA A100-SXM4-80GB"], 300 * GB, 25 * GB),
    "h100": Hardware(80 * GB, 3350 * GB, PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 450 * GB, 50 * GB),
    "h200": Hardware(141 * GB, 4800 * GB, PEAK_FLOPS["NVIDIA H200"], 450 * GB, 50 * GB),
    "b200": Hardware(180 * GB, 8000 * GB, PEAK_FLOPS["NVIDIA B200"], 900 * GB, 50 * GB),
}
"""By the names of `hybridlm.plan.topology.CHIPS`."""
