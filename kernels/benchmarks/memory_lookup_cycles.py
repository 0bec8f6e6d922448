"""Cycles that the TPU's memory kernels take per row by the compiler's schedule, with no TPU, over those of the memory.

    TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 JAX_PLATFORMS=cpu \
        python kernels/benchmarks/memory_lookup_cycles.py v5e --width 512 --dtype bfloat16

How often the kernels' loops run depends on the indices, so the bench has no estimate of them. This prints the bundles
of the longest such loop of each kernel, which reads a group of rows, starts the copies of a later one and computes, and
the bundles of a step of the grid outside of such loops. One bundle takes one cycle. Waiting for copies is not in it:
where the floor, the bytes of a row over the bandwidth, is less than the bundles, starting copies decides.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GROUP = 8  # rows that one pass of a loop reads
TOKENS, ROWS_PER_TOKEN, ROWS = 4096, 64, 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip", choices=("v4", "v5e", "v5p", "v6e", "tpu7x"))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        passes = "packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization|post-bundle-packing-post-ra"
        os.environ["LIBTPU_INIT_ARGS"] = (  # read when libtpu is loaded, so before anything of JAX is imported
            f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true "
            f"--xla_jf_dump_llo_pass_label_regex=.*({passes}).*"
        )
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is not compiled leaves no schedule
        compile_kernels(arguments.chip, arguments.width, arguments.dtype)
        report(Path(directory), passes.split("|"), arguments)


def compile_kernels(chip: str, width: int, dtype: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from hybridlm_kernels.bench.chips import CHIPS
    from hybridlm_kernels.memory_lookup import pallas_tpu
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def operand(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    table, indices = operand((ROWS, width // 128, 128), dtype), operand((TOKENS, ROWS_PER_TOKEN), jnp.int32)
    weights, x = (operand((TOKENS, size), jnp.float32) for size in (ROWS_PER_TOKEN, width))
    with jax.set_mesh(mesh):
        jax.jit(pallas_tpu.lookup).lower(table, indices, weights).compile()
        jax.jit(pallas_tpu.scores).lower(table, indices, x).compile()
        jax.jit(pallas_tpu.gradients).lower(table, indices, weights, x).compile()


def report(directory: Path, passes: Sequence[str], arguments: argparse.Namespace) -> None:
    from hybridlm_kernels.bench.chips import CHIPS
    from hybridlm_kernels.bench.schedule import read_schedule

    floor = CHIPS[arguments.chip].cycles(arguments.width * (2 if arguments.dtype == "bfloat16" else 4))
    for first in sorted(directory.glob(f"*-memory_*-{passes[0]}.txt")):
        if "schedule-analysis" in first.name:
            continue
        name = re.sub(r"^\d+-(.*)-\d+-.*", r"\1", first.name)
        texts = [next(directory.glob(f"*-{name}-??-{part}.txt")).read_text() for part in passes]
        grid, *loops = read_schedule(*texts).loops
        lengths = {loop: loop.last - loop.first + 1 for loop in (grid, *loops)}
        unknown = [lengths[loop] for loop in loops if loop.trips is None]
        repeated = sum(lengths[loop] * (loop.trips - 1) for loop in loops if loop.trips is not None)
        longest, outside = max(unknown), lengths[grid] - sum(unknown) + repeated
        print(
            f"{name} on {arguments.chip}, {arguments.dtype} rows of {arguments.width}: {longest / GROUP:.1f} cycles a"
            f" row in the main loop, {floor:.1f} for the memory to read one; {outside} a step outside of such loops"
        )


if __name__ == "__main__":
    main()
