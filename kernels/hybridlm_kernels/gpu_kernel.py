"""How every GPU kernel is made: Pallas' Mosaic GPU kernels, usable inside a `jax.shard_map` too."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.pallas import mosaic_gpu as plgpu

from hybridlm_kernels.jax_compat import vary, varying_axes


def gpu_kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel(body, **options)`, whose results vary over every manual mesh axis that an operand varies over.

    Mosaic GPU's kernels forget it (jax 0.10 to 0.12), whatever `out_type` says, and gradients then fail to trace.
    """
    run = plgpu.kernel(body, **options)

    def varying(*operands: Array) -> Any:
        axes = frozenset().union(*map(varying_axes, operands))
        return jax.tree.map(lambda result: vary(result, axes), run(*operands))

    return varying
