"""What a run begins with: the parameters of another run, new ones where that has none, more rows for more words."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from hybridlm import config, config_io
from hybridlm.config_check import ConfigError
from hybridlm.finetune.paths import map_with_paths, matches
from hybridlm.model import Params
from hybridlm.model.by_layer import by_name, field_of, places

ROW_NOISE = 0.01
"""Standard deviation of new words' vectors around the mean of the old, over that of the old."""
STACK_FIELDS = ("num_layers", "prologue", "pattern", "epilogue")
"""Of a model, those that are compared layer by layer."""
FREE_FIELDS = ("vocab_size", "dtype", "remat")
"""Those that say nothing of its function, and the number of words, which may grow."""


class Beginning(NamedTuple):
    """The parameters of a run, None in place of those to draw."""

    params: Params
    fresh: tuple[str, ...]
    """Paths of what is drawn."""
    num_new_words: int


def beginning(
    abstract: Params, model: config.Model, params: Params, source: config.Model, settings: config.Finetune, seed: int
) -> Beginning:
    """`params` of a run of `source`, in the form of those of a run of `model`, which `abstract` describes.

    All are NumPy arrays. Layers are matched by their numbers, whichever way the configs split the stack. Raises
    ConfigError where parameters are missing and `settings.fresh` does not allow it, where a field of the model differs
    that neither they nor `settings.differs` account for, or there are fewer words.
    """
    stored, num_new = by_name(params, source), model.vocab_size - source.vocab_size
    stored |= _within(stored, model, source)
    if num_new < 0:
        raise ConfigError(
            "model.vocab_size", f"={model.vocab_size}: the run to begin with has {source.vocab_size} words; keep them"
        )
    rng = np.random.default_rng(seed)
    fresh: list[str] = []
    missing: list[str] = []

    def found(path: str, like: Any) -> Any:
        names = _names(path, model)
        parts = [stored[name] for name in names if name in stored]
        if num_new and parts and path in ("embedding", "w_head"):
            parts = [_with_new_words(parts[0], num_new, 0 if path == "embedding" else 1, rng)]
        shape = like.shape[1:] if path.startswith("stack.repeats.") else like.shape
        if len(parts) < len(names) or any(part.shape != shape for part in parts):
            (fresh if matches(settings.fresh, path) else missing).append(path)
            return None
        return np.stack(parts) if path.startswith("stack.repeats.") else parts[0]

    made = map_with_paths(found, abstract)
    new = {name for path in (*fresh, *missing) for name in _names(path, model)}
    _check_fields(model, source, settings.differs, new)
    if missing:
        more = f" and {len(missing) - 4} more" if missing[4:] else ""
        raise ConfigError(
            "finetune.fresh",
            f": the run to begin with has no {', '.join(missing[:4])}{more}, or not of this shape; name what may be "
            f"drawn anew, as in --finetune.fresh='[\"{missing[0]}\"]'",
        )
    return Beginning(made, tuple(fresh), num_new)


def _with_new_words(table: np.ndarray, num: int, axis: int, rng: np.random.Generator) -> np.ndarray:
    """Words behind those of `table`, whose vectors are the mean of theirs and a little noise."""
    mean, spread = table.mean(axis=axis, keepdims=True), ROW_NOISE * table.std()
    shape = [num if i == axis else size for i, size in enumerate(table.shape)]
    new = mean + spread * rng.standard_normal(shape)
    return np.concatenate([table, new.astype(table.dtype)], axis=axis)


def _names(path: str, model: config.Model) -> list[str]:
    """What the layers that are stacked at `path` are called, whatever the stack: `layers.4.mixer.w_q`."""
    words = path.split(".")
    if words[0] != "stack":
        return [path]
    of_block = [layer for layer, (part, at, _) in enumerate(places(model)) if [part, str(at)] == words[1:3]]
    return [".".join(["layers", str(layer), *words[3:]]) for layer in of_block]


def _within(stored: dict[str, np.ndarray], model: config.Model, source: config.Model) -> dict[str, np.ndarray]:
    """The parameters of FFNs that `model` has a memory beside, by the names that they have there."""
    found = {}
    for layer, (new, old) in enumerate(zip(model.blocks(), source.blocks(), strict=False)):
        if isinstance(new.ffn, config.Beside | config.AddHeld) and new.ffn.ffn == old.ffn:
            before = f"layers.{layer}.ffn."
            found |= {
                before + "ffn." + name.removeprefix(before): x for name, x in stored.items() if name.startswith(before)
            }
    return found


def _check_fields(model: config.Model, source: config.Model, differs: Sequence[str], fresh: set[str]) -> None:
    """Raise ConfigError where the models differ, but for fields in `differs` and layers' parts with `fresh` names."""
    fields = [name for name in config_io.children(source) or {} if name not in (*FREE_FIELDS, *STACK_FIELDS)]
    if "w_head" in fresh:
        fields.remove("tied_embedding")
    problems = [
        line for name in fields for line in config_io.diff(getattr(source, name), getattr(model, name), f"model.{name}")
    ]
    mine, theirs = model.blocks(), source.blocks()
    if len(mine) < len(theirs):
        problems.append(f"model.num_layers: {len(theirs)} -> {len(mine)}")
    for layer, (new, old) in enumerate(zip(mine, theirs, strict=False)):
        where = f"model.{field_of(model, layer)}"
        for part in ("mixer", "ffn"):
            if not any(name.startswith(f"layers.{layer}.{part}.") for name in fresh):
                problems += config_io.diff(getattr(old, part), getattr(new, part), f"{where}.{part}")
    refused = [line for line in dict.fromkeys(problems) if not _allowed(differs, line.partition(":")[0])]
    if refused:
        raise ConfigError(
            refused[0].partition(":")[0],
            f":{refused[0].partition(':')[2]} is another model than that of the run to begin with"
            + (f", and {len(refused) - 1} more fields differ" if refused[1:] else "")
            + "; take its config, or name what may differ in finetune.differs",
        )


def _allowed(patterns: Sequence[str], field: str) -> bool:
    return any(fnmatchcase(field, pattern) for pattern in patterns)
