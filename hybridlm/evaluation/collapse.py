"""`--task collapse`: whether a model's states run away beyond the length that it was trained on.

Stuffed Mamba (Chen et al., 2024, arXiv:2410.07145, section 3): recurrent models that never had to forget overwrite what
they know once a text is longer than those they were trained on. Statistics of their states leave the range that they
had in training, and the loss per token rises.

Letters: b batch, t time.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybridlm.config_check import ConfigError
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Rows, Scorer
from hybridlm.evaluation.text_losses import texts_of
from hybridlm.model.by_layer import places
from hybridlm.model.lm import LMState

DEFAULT_TIMES = 8
"""The length of the text, over that of training."""
RECURRENT = ("h", "s", "slot_keys", "slot_values")
"""States of recurrences; caches and what convolutions keep cannot collapse."""
STANDARD_ERRORS = 3.0
LEAST_RISE = 0.02
"""Nats per token; a smaller rise is no collapse, however sure."""


def collapse(scorer: Scorer, options: Options) -> dict[str, Any]:
    """Rows of text far longer than in training, read window by window from the state behind the one before.

    `by_window` holds for each window its end, the mean `loss` over rows, `risen` (its loss is above that of the last
    window within the training length by `STANDARD_ERRORS` of their difference and by `LEAST_RISE`), and for every layer
    with a recurrent state the `mean` and `variance` of its entries and the `norm`, a mean over rows. `first_risen` is
    where the loss rises for good, if it does, and `norm_growth` the largest ratio of a norm at the end to that at the
    training length. `by_length` has the loss and the norms alone, of the windows that `lines_of` shows.

    Raises ConfigError where the text is too short.
    """
    if options.length is not None and len(options.length) > 1:
        raise ConfigError("--length", ": of collapse is one, the longest")
    size = scorer.context
    [length] = options.length or (DEFAULT_TIMES * scorer.train_length,)
    in_training = max(1, scorer.train_length // size)
    num_windows = length // size
    if num_windows <= in_training:
        raise ConfigError(
            f"--length={length}",
            f": must be at least {(in_training + 1) * size}, a window beyond the training length",
        )
    tokens = rows_of_text(scorer, options, num_windows * size)
    state = scorer.init_state(num_windows * size)
    jitted = jax.jit(statistics_of)

    def measured(state: LMState) -> Any:
        with jax.set_mesh(scorer.mesh):
            return jitted(state["stack"])

    windows: list[dict[str, Any]] = []
    losses = []
    for end in range(size, num_windows * size + 1, size):
        part = tokens[:, end - size : end + 1]
        ids = (part[:, 1:] >= 0).astype(np.int32)
        scores, state = scorer.carried(Rows(np.maximum(part[:, :-1], 0), np.maximum(part[:, 1:], 0), ids), state)
        real = ids[:, 0] > 0
        losses.append(np.asarray(scores.nats)[real].mean(axis=1, dtype=np.float64))
        layers = [
            {"layer": layer} | {name: float(np.mean(np.asarray(v)[real])) for name, v in found.items()}
            for layer, found in by_layer(scorer, measured(state)).items()
        ]
        windows.append({"end": end, "loss": float(losses[-1].mean()), "layers": layers})
    before = losses[in_training - 1]
    for window, loss in zip(windows, losses, strict=True):
        window["risen"] = window["end"] > in_training * size and has_risen(before, loss)
    for_good = next((w["end"] for i, w in enumerate(windows) if all(v["risen"] for v in windows[i:])), None)
    norms = [{found["layer"]: found["norm"] for found in window["layers"]} for window in windows]
    at_training = norms[in_training - 1]
    growth = max((norms[-1][layer] / max(norm, 1e-30) for layer, norm in at_training.items()), default=None)
    return {
        "length": num_windows * size,
        "train_length": scorer.train_length,
        "rows": len(before),
        "loss_at_train_length": windows[in_training - 1]["loss"],
        "loss_at_end": windows[-1]["loss"],
        "first_risen": for_good,
        "norm_growth": growth,
        "by_length": [
            {"length": window["end"], "loss": window["loss"]}
            | {f"layer {found['layer']}": found["norm"] for found in window["layers"]}
            for window in doubling(windows)
        ],
        "by_window": windows,
    }


def doubling(windows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number 1, 2, 4, 8, ..., and the last."""
    return [window for n, window in enumerate(windows, 1) if n & (n - 1) == 0 or n == len(windows)]


def rows_of_text(scorer: Scorer, options: Options, length: int) -> np.ndarray:
    """[b, length + 1] int32: the documents joined into one and cut into rows; rows that are too many hold -1."""
    texts = texts_of(scorer, options)
    stream = np.concatenate([texts[0].tokens[:1], *(text.tokens[1:] for text in texts)])
    there = min((len(stream) - 1) // length, scorer.num_rows)
    if there < 1:
        raise ConfigError(
            f"--length={length}",
            f": the text has {len(stream) - 1:,} tokens; give a smaller length or more --data",
        )
    rows = np.full((scorer.num_rows, length + 1), -1, np.int32)
    for row in range(there):
        rows[row] = stream[row * length : (row + 1) * length + 1]
    return rows


def has_risen(before: Float[np.ndarray, " b"], now: Float[np.ndarray, " b"]) -> bool:
    """Of losses of the same rows. Of a single row, whose error is unknown, the rise alone tells."""
    rise = now - before
    error = rise.std(ddof=1) / np.sqrt(len(rise)) if len(rise) > 1 else 0.0
    return bool(rise.mean() > max(STANDARD_ERRORS * error, LEAST_RISE))


def statistics_of(stack: Mapping[str, Any]) -> dict[str, list[dict[str, Array] | None]]:
    """`mean` and `variance` of the entries of each row's recurrent state and its `norm`, in place of every mixer's."""
    return {
        part: [_statistics(state, first=1 if part == "repeats" else 0) for state in states]
        for part, states in stack.items()
    }


def _statistics(state: Mapping[str, Array], first: int) -> dict[str, Array] | None:
    """Over all axes behind that of rows, which is number `first`."""
    parts = [state[name].astype(jnp.float32) for name in RECURRENT if name in state]
    if not parts:
        return None
    axes = [tuple(range(first + 1, part.ndim)) for part in parts]
    count = sum(part.size // math.prod(part.shape[: first + 1]) for part in parts)
    added = sum(jnp.sum(part, axis=over) for part, over in zip(parts, axes, strict=True))
    squares = sum(jnp.sum(part * part, axis=over) for part, over in zip(parts, axes, strict=True))
    mean = jnp.asarray(added) / count
    return {"mean": mean, "variance": squares / count - mean * mean, "norm": jnp.sqrt(squares)}


def by_layer(scorer: Scorer, statistics: Any) -> dict[int, dict[str, Any]]:
    """Those of every layer that has a recurrent state."""
    statistics = jax.device_get(statistics)
    found = {}
    for layer, place in enumerate(places(scorer.cfg.model)):
        mixer = statistics[place.part][place.position]
        if mixer is not None:
            found[layer] = mixer if place.repeat is None else {k: v[place.repeat] for k, v in mixer.items()}
    return found


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """Loss and the norms of states by length, doubling from window to window, and what they say."""
    windows = report["by_window"]
    layers = [found["layer"] for found in windows[0]["layers"]]
    lines = ["     tokens     loss " + "".join(f"  norm of {layer:<3}" for layer in layers)]
    for window in doubling(windows):
        norms = "".join(f"{found['norm']:13.3f}" for found in window["layers"])
        beyond = "  risen" if window["risen"] else "  beyond training" if window["end"] > report["train_length"] else ""
        lines.append(f"{window['end']:11,} {window['loss']:8.4f} {norms}{beyond}")
    if report["first_risen"] is None:
        lines.append(f"the loss stays where it was at {report['train_length']:,} tokens, the training length")
    else:
        lines.append(f"COLLAPSE: the loss rises for good from {report['first_risen']:,} tokens on")
    return lines
