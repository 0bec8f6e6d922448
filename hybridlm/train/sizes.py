"""How many parameters each part of a model has."""

import math
from collections import Counter
from typing import Any

import jax

from hybridlm import config


def parameters_by_part(model: config.Model, params: Any) -> dict[str, int]:
    """Counts by part: those outside the stack by their own name, those within by the class of mixer or FFN, or `norm`.

    `params` may be abstract: only shapes are read.
    """
    counts: Counter[str] = Counter()
    for name, part in params.items():
        if name != "stack":
            counts[name] += size(part)
            continue
        for place, blocks in part.items():
            field = "pattern" if place in ("repeats", "tail") else place
            for position, block in blocks.items():
                of_block = getattr(model, field)[int(position)]
                for key, x in block.items():
                    counts[type(getattr(of_block, key)).__name__ if key in ("mixer", "ffn") else "norm"] += size(x)
    return dict(counts)


def size(tree: Any) -> int:
    """Numbers in all arrays of a tree."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
