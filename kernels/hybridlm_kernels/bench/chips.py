"""TPU generations that the static estimate knows, per JAX device: clocks, memory bandwidth, the compiler's names.

Bandwidth and VMEM are those of `jax.experimental.pallas.tpu.get_tpu_info`. The clock is the published bf16 peak over
what the MXUs do per cycle (2 FLOP x MXUs x rows x columns), so that cycles and peak agree.
"""

import dataclasses

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device: a TensorCore, or both of a chip where they act as one (v5p's megacore)."""

    name: str
    topology: str
    """The smallest slice that libtpu compiles for without hardware."""
    clock_hz: float
    peak_flops: float
    """bf16 matrix multiplications, FLOP/s."""
    hbm_bytes_per_s: float
    scoped_vmem_bytes: int
    """What one kernel may allocate unless it asks for more; v4 has no more."""

    def cycles(self, hbm_bytes: float, mxu_flops: float = 0) -> float:
        """The fewest cycles in which this much memory traffic and matrix multiplication can happen."""
        return self.clock_hz * max(hbm_bytes / self.hbm_bytes_per_s, mxu_flops / self.peak_flops)

    def microseconds(self, cycles: float) -> float:
        return 1e6 * cycles / self.clock_hz


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "v4:2x2x1", 1.05e9, 137.5e12, 0.614e12, 16 * MIB),
        Chip("v5e", "v5e:2x2", 1.50e9, 197e12, 0.820e12, 16 * MIB),
        Chip("v5p", "v5p:2x2x1", 1.75e9, 459e12, 2.460e12, 16 * MIB),
        Chip("v6e", "v6e:2x2", 1.75e9, 918e12, 1.640e12, 32 * MIB),
        Chip("tpu7x", "tpu7x:2x2x1", 2.20e9, 1155e12, 3.700e12, 32 * MIB),
    )
}
