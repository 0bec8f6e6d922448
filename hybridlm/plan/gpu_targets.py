"""What XLA has to know of a GPU that is not there, as the text of its `GpuTargetConfigProto`.

Multiprocessors, memories and clocks are those of NVIDIA's data sheets and what devices report (`cudaDeviceProp`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """An SXM module."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fpus: int
    shared_bytes: int
    """Of a multiprocessor; a block may have 1 KiB less."""
    bytes_per_s: float
    cache_bytes: int
    clock_ghz: float
    memory_bytes: int

    def target(self) -> str:
        major, minor = self.capability
        accelerated = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
        return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} {accelerated} }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.shared_bytes - 1024}
  core_count: {self.multiprocessors} fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bytes_per_s:.0f} l2_cache_size: {self.cache_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 28 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.name}"
"""


MIB = 2**20
GPUS = {
    "a100": GPU("NVIDIA A100", (8, 0), 108, 64, 167936, 2.039e12, 40 * MIB, 1.41, 81920 * MIB),
    "h100": GPU("NVIDIA H100", (9, 0), 132, 128, 233472, 3.352e12, 50 * MIB, 1.98, 81042 * MIB),
    "h200": GPU("NVIDIA H200", (9, 0), 132, 128, 233472, 4.8e12, 50 * MIB, 1.98, 143771 * MIB),
    "b200": GPU("NVIDIA B200", (10, 0), 148, 128, 233472, 8.0e12, 126 * MIB, 1.965, 183359 * MIB),
}
