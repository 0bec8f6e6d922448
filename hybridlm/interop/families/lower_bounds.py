"""HGRN2's lower bounds: of flash-linear-attention one array for all layers, of ours a logit per layer and channel.

l_i = sum_{0 < j <= i} softmax(raw)_j over layers j: 0 in the first layer, growing with depth (arXiv:2404.07904).

Letters: n layers, c channels.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hybridlm.config_check import ConfigError
from hybridlm.interop.rules import Rule, Shape

NOTHING = 30.0
"""By how much less than the least the logarithm of a share is that does not count in float32."""


def lower_bounds(ours: Sequence[str], bounded: Sequence[int], theirs: str, num_layers: int, channels: int) -> Rule:
    """`raw` [n, c] and the logits of the layers `bounded`; other layers, which are attention, pass over theirs.

    Not exact: what is read from a checkpoint is kept beside the run, and given back as long as the logits are the same.
    """

    def to_ours(tensors: Iterable[np.ndarray], shapes: Sequence[Shape]) -> list[np.ndarray]:
        (raw,) = tensors
        return [
            logit.astype(np.float32).reshape(shape)
            for logit, shape in zip(logits_of(raw)[list(bounded)], shapes, strict=True)
        ]

    def to_theirs(arrays: Sequence[Any]) -> list[Any]:
        xp = arrays[0].__array_namespace__()
        if xp is not np:
            return [xp.zeros((num_layers, channels))]  # traced for the shape
        return [raw_of(np.stack([array.reshape(-1) for array in arrays]), bounded, num_layers).astype(np.float32)]

    return Rule(tuple(ours), (theirs,), to_ours, to_theirs, exact=False)


def logits_of(raw: np.ndarray) -> np.ndarray:
    """log(l / (1 - l)) [n, c] in float64; -inf in the first layer."""
    wide = raw.astype(np.float64)
    share = np.exp(wide - wide.max(axis=0))
    share /= share.sum(axis=0)
    below = np.concatenate([np.zeros_like(share[:1]), np.cumsum(share[1:], axis=0)])
    above = share[0] + np.concatenate([np.cumsum(share[:0:-1], axis=0)[::-1], np.zeros_like(share[:1])])
    with np.errstate(divide="ignore"):
        return np.log(below) - np.log(above)


def raw_of(logits: np.ndarray, bounded: Sequence[int], num_layers: int) -> np.ndarray:
    """`raw` [n, c] in float64 for the logits [m, c] of the layers `bounded`.

    Raises ConfigError where a bound is not above that of the layer before.
    """
    wide = logits.astype(np.float64)
    bounds = 1 / (1 + np.exp(-wide))
    steps = np.diff(bounds, axis=0, prepend=0.0)
    if (steps <= 0).any():
        layer, channel = np.argwhere(steps <= 0)[0]
        raise ConfigError(
            f"layers.{bounded[layer]}.mixer.lower_bound",
            f": falls below that of the layer before in channel {channel}; HGRN2ForCausalLM's only grow with depth",
        )
    rest = 1 / (1 + np.exp(wide[-1]))  # 1 - l of the last, without its cancellation
    used = np.log(np.concatenate([rest[None], steps]))
    raw = np.repeat(used.min(axis=0, keepdims=True) - NOTHING, num_layers, axis=0)
    raw[[0, *bounded]] = used
    return raw
