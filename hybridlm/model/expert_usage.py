"""How often each expert is chosen. Letters: b batch, t time, n tokens, l layers with experts, x experts."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import Aux, Pass
from hybridlm.ffns.moe.layer import MoE
from hybridlm.ffns.moe.routing import Routing, Tokens, expert_counts
from hybridlm.mixers.base import Carry, Segments
from hybridlm.model.lm import LM
from hybridlm.sharding import total

Batch = dict[str, Array]
CHOICES = "moe_choices"


class CountingRouter(nnx.Module):
    """A router that also reports how many of the batch's tokens go to each expert, filled up with 0 to `width`."""

    def __init__(self, router: nnx.Module, num_experts: int, width: int):
        self.router, self.num_experts, self.width = router, num_experts, width

    def __call__(self, tokens: Tokens, carry: Carry, given: Pass) -> tuple[Routing, Aux, Carry]:
        routing, aux, carry = self.router(tokens, carry, given)  # pyright: ignore[reportCallIssue]
        counts = total(expert_counts(routing.experts, self.num_experts), "batch")
        return routing, aux | {CHOICES: jnp.pad(counts, (0, self.width - self.num_experts))}, carry


def moes_of(lm: LM) -> Iterator[tuple[str, int, MoE]]:
    """The mixtures of experts of a model, each with the part of the stack and the index that it lies at."""
    for part in ("prologue", "repeats", "tail", "epilogue"):
        for index, block in enumerate(getattr(lm.stack, part, ())):
            if isinstance(block.ffn, MoE):
                yield part, index, block.ffn


def layers_with_experts(model: config.Model) -> dict[int, int]:
    """The number of experts of every layer that has some."""
    ffns = enumerate(block.ffn for block in model.blocks())
    return {layer: ffn.num_experts for layer, ffn in ffns if isinstance(ffn, config.MoE)}


def count_choices(
    bind: Callable[[Any], LM], params: Any, batches: Iterable[Batch], model: config.Model
) -> dict[int, Int[np.ndarray, " x"]]:
    """How many tokens of `batches` choose each expert, by layer. Ordinary forward passes count nothing of it."""
    layers = layers_with_experts(model)

    @jax.jit
    def count(params: Any, batch: Batch) -> Int[Array, "l x"]:
        lm = bind(params)
        for _, _, moe in moes_of(lm):
            moe.router = CountingRouter(moe.router, moe.cfg.num_experts, max(layers.values()))
        _, _, aux = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        return aux[CHOICES]

    counts = np.zeros((len(layers), max(layers.values())), np.int64)
    for batch in batches:
        counts += np.asarray(count(params, batch))
    return {layer: row[:x] for (layer, x), row in zip(layers.items(), counts, strict=True)}


def shares(counts: Int[np.ndarray, " x"]) -> Float[np.ndarray, " x"]:
    """Of all choices in a layer; 0 where there were none."""
    return counts / max(counts.sum(), 1)


def read_usage(path: Path, model: config.Model) -> dict[int, Float[np.ndarray, " x"]]:
    """Each layer's shares from a file that `hybridlm experts RUN --json FILE` wrote.

    Raises ConfigError where it is no such file, or of a model with other layers or experts.
    """
    try:
        found = {
            int(entry["layer"]): np.asarray(entry["share"], np.float64)
            for entry in json.loads(path.read_text(encoding="utf-8"))["layers"]
        }
    except OSError as error:
        raise ConfigError(str(path), f": cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(str(path), ": is no usage of experts; `hybridlm experts RUN --json FILE` writes it") from None
    wanted = {layer: (x,) for layer, x in layers_with_experts(model).items()}
    if {layer: share.shape for layer, share in found.items()} != wanted:
        raise ConfigError(str(path), ": is the usage of a model with other layers or numbers of experts")
    return found


def hottest(usage: Shaped[np.ndarray, " x"], num: int) -> Int[np.ndarray, " num"]:
    """The `num` experts chosen most often, ascending."""
    return np.sort(np.argsort(-usage, kind="stable")[:num])
