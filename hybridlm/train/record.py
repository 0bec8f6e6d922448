"""What a checkpoint says of itself, and whether what is in it is that, and what is asked of it."""

import json
from pathlib import Path
from typing import Any

from hybridlm.config_check import ConfigError
from hybridlm.train import layout
from hybridlm.train.integrity import digest_of

FORMAT = 3
"""Of the training state. Parameters alone can be read from checkpoints of other formats too."""
FINGERPRINTS = "fingerprints"


class Damaged(Exception):
    """A checkpoint is not what was saved; the text says which of its files or arrays."""


def describe(arrays: dict[str, Any], prints: dict[str, str], data: Any, config: Any) -> dict[str, Any]:
    """What a checkpoint says of itself: shape, dtype and fingerprint of every array, digests of the other parts."""
    said = {
        name: {"shape": list(shape), "dtype": dtype, "fingerprint": prints[name]}
        for name, (shape, dtype) in layout.shapes(arrays).items()
    }
    record = {"arrays": said, "data": digest_of(data), "config": digest_of(config)}
    return record | {"digest": digest_of(record)}


def read_parts(path: Path) -> tuple[dict[str, Any], str | None]:
    """Data position, config and, from format 3 on, fingerprints of a checkpoint, or what is wrong with them."""
    parts: dict[str, Any] = {}
    for name in ("config", "data", FINGERPRINTS):
        try:
            (file,) = (path / name).glob("*.json")
            parts[name] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if name == FINGERPRINTS and parts["config"].get("format") != FORMAT and not (path / name).exists():
                return parts, None
            return parts, f"{name} cannot be read"
        if not isinstance(parts[name], dict):
            return parts, f"{name} is damaged"
    record = dict(parts[FINGERPRINTS])
    if record.pop("digest", None) != digest_of(record):
        return parts, f"{FINGERPRINTS} are damaged"
    wrong = (f"{name} is damaged" for name in ("config", "data") if record[name] != digest_of(parts[name]))
    return parts, next(wrong, None)


def damage_of_arrays(found: dict[str, str], wanted: dict[str, Any]) -> str | None:
    wrong = [name for name, said in wanted.items() if found[name] != said["fingerprint"]]
    return (
        f"{wrong[0]} has another fingerprint" + (f", and {len(wrong) - 1} more" if wrong[1:] else "") if wrong else None
    )


def check_format(path: Path, saved: dict[str, Any]) -> None:
    written = saved.get("format")
    if written != FORMAT:
        raise ConfigError(
            str(path),
            f": was written in format {written}, and this version goes on from format {FORMAT}; go on with the "
            "version that began it (evaluation and generation can read it as it is)",
        )


def check_same(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError where a state's arrays are not those that are wanted, in name, shape and dtype."""
    has = {name: f"{said['dtype']}{said['shape']}" for name, said in stored.items()}
    asked = {name: f"{dtype}{list(shape)}" for name, (shape, dtype) in layout.shapes(wanted).items()}
    for name in sorted(has.keys() | asked.keys()):
        if has.get(name) != asked.get(name):
            raise ConfigError(
                str(path),
                f": has {has.get(name, 'nothing')} as {name}, and the config asks for {asked.get(name, 'nothing')}; "
                "use the run's own config",
            )


def check_shapes(path: Path, stored: dict[str, tuple[int, ...]], wanted: dict[str, Any]) -> None:
    """Raise ConfigError where parameters that are wanted are not stored, or in another shape."""
    for name, x in wanted.items():
        if stored.get(name) != tuple(x.shape):
            has = f"has {name} of shape {stored[name]}" if name in stored else f"has no {name}"
            raise ConfigError(
                str(path), f": {has}, not {tuple(x.shape)} as the config asks for; leave the run's model.* as they are"
            )
