"""XLA's options per platform, in one table: those that let communication and computation overlap. Imports no JAX.

- TPU: none that libtpu 0.0.52 does not set itself. `async %` of the plans' collectives tells what it does:

      hybridlm plan griffin_7b --topology v5e:16x16
      hybridlm plan griffin_7b --topology v5p:4x4x4
      hybridlm plan transformer_1b --topology v5p:4x4x4 --model.num-layers=3 --sharding.xla-options='["NAME=true"]'

  On v5e and v6e it gathers weights asynchronously, 96 % of the bytes of the first; on v5p, the second, at once. The
  third says the same of collectives and bytes with xla_tpu_enable_async_collective_fusion and
  xla_tpu_enable_async_collective_fusion_fuse_all_gather as with neither; the latter and xla_enable_async_all_gather
  together are refused, on v6e too, as leading to wrong results. What made a part asynchronous on v5p, all three of
  xla_tpu_enable_sparse_core_collective_offload_all_gather, _reduce_scatter and _all_reduce, took more temporaries:
  worth a trial on the devices, and an option of a run's own.
- GPU: the scheduler that moves the start of a collective ahead of the computation that it can hide behind; the
  program's bytes and collectives stay the same without it:

      hybridlm plan griffin_1b --topology h200:8 --train.num-microbatches=4 \\
          --sharding.xla-options='["xla_gpu_enable_latency_hiding_scheduler=false"]'

- CPU: none, for nothing is asynchronous there.

An option that the compiler does not know, or whose value it refuses, stops the compilation.
"""

from collections.abc import Sequence
from typing import Any

from hybridlm.config_check import ConfigError

OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {},
    "tpu": {},
    "gpu": {"xla_gpu_enable_latency_hiding_scheduler": True},
}


def compiler_options(platform: str, own: Sequence[str]) -> dict[str, Any]:
    """What a training step for such devices is compiled with, and a run's `own` options, each `name=value`.

    Raises ConfigError where one of these is not.
    """
    options = dict(OPTIONS[platform])
    for i, option in enumerate(own):
        name, equals, value = option.partition("=")
        if not (name and equals and value):
            raise ConfigError(
                f"sharding.xla_options.{i}", f"={option}: expected name=value, as XLA's flags are written"
            )
        options[name] = {"true": True, "false": False}.get(value, value)
    return options
