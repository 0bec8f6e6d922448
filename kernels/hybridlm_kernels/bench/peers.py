"""Other people's ways to compute what ours do, to time beside them. Letters: b batch, t time, d channels, w taps."""

import importlib
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from hybridlm_kernels.target import target_of

RG_LRU_SCALE = 8.0  # c of De et al. 2024 (arXiv:2402.19427), section 2.4


def missing(peer: str) -> str | None:
    """What to install before `peer` can run; None where it can."""
    if peer == "recurrentgemma" and importlib.util.find_spec("recurrentgemma") is None:
        return "pip install --no-deps recurrentgemma==1.0.1 'typeguard<3' einops"
    return None


def associative_scan(a: Array, x: Array) -> Array:
    """h_t = a_t h_{t-1} + x_t by `jax.lax.associative_scan`, under automatic differentiation. [b, t, d]"""

    def compose(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    wide = a.astype(jnp.float32), x.astype(jnp.float32)
    return jax.lax.associative_scan(compose, wide, axis=1)[1].astype(x.dtype)


def recurrentgemma_scan(a: Array, x: Array) -> Array:
    """h_t = a_t h_{t-1} + x_t by google-deepmind/recurrentgemma: its Pallas kernel on TPU, else its plain loop."""
    scan = importlib.import_module("recurrentgemma.jax.scan")
    kinds = importlib.import_module("recurrentgemma.common").ScanType
    kind = kinds.LINEAR_PALLAS if target_of((a, x)).platform == "tpu" else kinds.LINEAR_NATIVE
    return scan.linear_scan(x=x, a=a, scan_type=kind)[0]


def unfused_rg_lru(
    scan: Callable[[Array, Array], Array], x: Array, gate_a: Array, gate_x: Array, decay: Array
) -> Array:
    """RG-LRU of one document with the gates' maths in float32, left to the compiler, around a scan.

    x and the gates [b, t, d], decay [d]; the root is 1 at the first token.
    """
    wide = x.astype(jnp.float32), gate_a.astype(jnp.float32), gate_x.astype(jnp.float32)
    log_a = -RG_LRU_SCALE * jax.nn.softplus(decay) * jax.nn.sigmoid(wide[1])
    first = (jnp.arange(x.shape[1]) == 0)[:, None]  # t 1
    gain = jnp.where(first, 1.0, jnp.sqrt(-jnp.expm1(2 * log_a)))
    return scan(jnp.exp(log_a), gain * jax.nn.sigmoid(wide[2]) * wide[0]).astype(x.dtype)


def lax_conv(x: Array, w: Array, bias: Array) -> Array:
    """silu of a causal depthwise convolution by `jax.lax.conv_general_dilated`. x [b, t, d], w [w, d]"""
    taps, d = w.shape
    y = jax.lax.conv_general_dilated(
        x.astype(jnp.float32),
        w[:, None],  # w 1 d
        window_strides=(1,),
        padding=[(taps - 1, 0)],
        dimension_numbers=("NTC", "TIO", "NTC"),
        feature_group_count=d,
    )
    return jax.nn.silu(y + bias).astype(x.dtype)
