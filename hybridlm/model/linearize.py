"""Softmax attention to gated linear recurrences that have its weights (Liger: Lan et al., 2025, arXiv:2503.01496)."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import jax

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import Params
from hybridlm.model.by_layer import layers_of, stack_of


def linearize(params: Params, before: config.Model, after: config.Model) -> Params:
    """The parameters of `before`, as NumPy arrays, where `after = linearized_model(before, ...)` has them.

    None is new: `Liger` has those of `Attention`, by name and shape.
    """
    others = {name: jax.device_get(part) for name, part in params.items() if name != "stack"}
    return others | {"stack": stack_of(layers_of(params["stack"], before), after)}


def linearized_model(
    model: config.Model, *, recurrence: Any, window: int, keep_every: int | None = None
) -> config.Model:
    """`model` with `Liger` in place of attention that sees more than `window` tokens.

    Of these layers every `keep_every`-th stays. Raises ConfigError where no layer is left to change, or an option is
    out of range.
    """
    if window < 1:
        raise ConfigError("--window", f"={window}: must be at least 1")
    if keep_every is not None and keep_every < 2:
        raise ConfigError("--keep-every", f"={keep_every}: must be at least 2; 1 would change nothing")
    blocks, seen = model.blocks(), 0
    for i, block in enumerate(blocks):
        mixer = block.mixer
        if isinstance(mixer, config.Attention) and (mixer.window is None or mixer.window > window):
            seen += 1
            if keep_every is None or seen % keep_every:
                blocks[i] = replace(block, mixer=liger_of(mixer, recurrence=recurrence, window=window))
    if blocks == model.blocks():
        raise ConfigError("model.pattern", f": no layer has attention over more than {window} tokens; nothing to do")
    first, last = len(model.prologue), len(blocks) - len(model.epilogue)
    return replace(
        model,
        prologue=tuple(blocks[:first]),
        pattern=shortest_pattern(blocks[first:last]) or model.pattern,
        epilogue=tuple(blocks[last:]),
    )


def liger_of(attention: config.Attention, *, recurrence: Any, window: int) -> config.Liger:
    """With the parameters of `attention`."""
    shared = {field.name for field in fields(config.Liger)} & {field.name for field in fields(attention)} - {"window"}
    same = {name: getattr(attention, name) for name in shared}
    return config.Liger(**same, window=window, recurrence=recurrence)


def shortest_pattern(blocks: Sequence[config.Block]) -> tuple[config.Block, ...]:
    """The fewest blocks whose repetition, which may end in its middle, gives `blocks`."""
    lengths = range(1, len(blocks) + 1)
    fits = (n for n in lengths if all(block == blocks[i % n] for i, block in enumerate(blocks)))
    return tuple(blocks[: next(fits, 0)])
