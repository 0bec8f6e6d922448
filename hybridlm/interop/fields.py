"""Fields of a published config.json, read with one-line errors."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridlm.config import Block, Llama3Rope
from hybridlm.config_check import ConfigError

CONFIG = "config.json"


class Fields:
    """The fields of a config.json. Those that change what a model computes must be asked for, or they are lost."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, name: str) -> Any:
        if self.values.get(name) is None:
            raise ConfigError(name, ": is missing")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` where it is absent or null."""
        value = self.values.get(name)
        return default if value is None else value

    def only(self, name: str, *supported: Any) -> Any:
        """The value, the first of `supported` where it is absent; ConfigError where it is none of them."""
        value = self.get(name, supported[0])
        if value not in supported:
            raise ConfigError(name, f"={value!r}: is not supported; known: {', '.join(map(repr, supported))}")
        return value


def read_fields(directory: Path) -> Fields:
    """Those of the config.json in a directory. Raises ConfigError where it is none."""
    path = directory / CONFIG
    if not directory.is_dir():
        raise ConfigError(str(directory), ": no such directory; give one with config.json and model.safetensors")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(directory), ": holds no config.json, so it is no published model") from None
    except (OSError, ValueError):
        raise ConfigError(str(path), ": is not JSON") from None
    if not isinstance(values, dict):
        raise ConfigError(str(path), ": is not an object")
    return Fields(values)


def check_not_quantized(fields: Fields) -> None:
    """Raise ConfigError where the weights are codes that only their library makes numbers of."""
    for name in ("quantization_config", "compression_config"):
        said = fields.get(name)
        if said is not None:
            method = said.get("quant_method") if isinstance(said, dict) else None
            kind = f"={method}" if method else ""
            raise ConfigError(
                name, f"{kind}: quantized weights are not read; take the model in bfloat16, float16 or float32"
            )


def number(value: Any) -> float:
    """A number of a config.json; transformers 5 writes {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def rotary(fields: Fields, head_dim: int, *, fraction: float = 1.0) -> dict[str, Any]:
    """`rope_theta`, `rope_fraction` and `rope_scaling` of attention, of configs of transformers 4 and 5."""
    nested = {**fields.get("rope_scaling", {}), **fields.get("rope_parameters", {})}
    told = Fields({**fields.values, **nested})
    kind = told.get("rope_type", told.get("type", "default"))
    scaling = None
    if kind == "llama3":
        scaling = Llama3Rope(
            factor=float(told["factor"]),
            low_frequency=float(told["low_freq_factor"]),
            high_frequency=float(told["high_freq_factor"]),
            original_length=told["original_max_position_embeddings"],
        )
    elif kind != "default":
        raise ConfigError("rope_type", f"={kind!r}: is not supported; known: 'default', 'llama3'")
    fraction = float(told.get("partial_rotary_factor", fraction))
    if int(head_dim * fraction) % 2:
        raise ConfigError("partial_rotary_factor", f"={fraction}: rotates an odd part of heads of {head_dim}")
    theta = float(told.get("rope_theta", 10_000.0))
    return {"rope_theta": theta, "rope_fraction": fraction, "rope_scaling": scaling}


def rotary_fields(theta: float, fraction: float, scaling: Llama3Rope | None) -> dict[str, Any]:
    """The inverse of `rotary`, for transformers 4 and 5 alike."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        kind = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency,
            "high_freq_factor": scaling.high_frequency,
            "original_max_position_embeddings": scaling.original_length,
        }
    shared = {"rope_theta": theta} | ({} if fraction == 1.0 else {"partial_rotary_factor": fraction})
    return {**shared, "rope_scaling": None if scaling is None else kind, "rope_parameters": {**kind, **shared}}


def layer_kinds(fields: Fields, default: Sequence[str], known: Collection[str]) -> Sequence[str]:
    """`layer_types`, or `default` where it is absent: that of every layer, one of `known`."""
    kinds = fields.get("layer_types", default)
    if len(kinds) != len(default):
        raise ConfigError("layer_types", f": are {len(kinds)}, and num_hidden_layers={len(default)}")
    for kind in kinds:
        if kind not in known:
            raise ConfigError("layer_types", f": {kind!r} is not supported; known: {', '.join(known)}")
    return kinds


def layers(blocks: Sequence[Block]) -> dict[str, Any]:
    """`prologue`, `pattern` and `num_layers` of a model of these layers, with as few different blocks as possible."""
    count = len(blocks)
    if not count:
        raise ConfigError("num_hidden_layers", ": must be at least 1")

    def repeats(prologue: int, period: int) -> bool:
        return all(blocks[i] == blocks[i - period] for i in range(prologue + period, count))

    sizes = ((prologue, period) for prologue in range(count) for period in range(1, count - prologue + 1))
    prologue, period = min((pair for pair in sizes if repeats(*pair)), key=lambda pair: (sum(pair), pair[0]))
    return {
        "prologue": tuple(blocks[:prologue]),
        "pattern": tuple(blocks[prologue : prologue + period]),
        "num_layers": count,
    }
