"""Adapters of parameters that are at rest: what a checkpoint has of them, and their sums with what they adapt."""

from typing import Any

import jax
import numpy as np

from hybridlm import config, config_io
from hybridlm.finetune.adapters import ADAPTERS, adapter_shapes, adapters_of, base_of, merged, nested, targets_of
from hybridlm.finetune.paths import by_path, map_with_paths
from hybridlm.model import Params


def lora_of(saved: dict[str, Any]) -> config.LoRA | None:
    """That of the config in a checkpoint, as JSON has it."""
    lora = saved.get("finetune", {}).get("lora")
    return None if lora is None else config_io.from_dict(config.LoRA, lora, "finetune.lora")


def abstract_adapted(lora: config.LoRA, abstract: Params) -> Params:
    """Descriptions of a model's parameters with those of their adapters, which lie on the same devices.

    Either are NumPy arrays where those given are.
    """
    leaves, made = by_path(abstract), {}
    for path, axes in targets_of(lora, abstract).items():
        w = leaves[path]
        entries = getattr(getattr(w, "sharding", None), "spec", None)
        padded = None if entries is None else (*entries, *(None,) * (w.ndim - len(entries)))
        made[path] = {
            name: _like(w, shape, spec) for name, (shape, spec) in adapter_shapes(lora, w.shape, axes, padded).items()
        }
    return abstract | {ADAPTERS: nested(made)}


def _like(w: Any, shape: tuple[int, ...], spec: tuple[Any, ...] | None) -> Any:
    if isinstance(w, np.ndarray):
        return np.broadcast_to(np.zeros((), w.dtype), shape)
    sharding = w.sharding
    if isinstance(sharding, jax.NamedSharding):
        assert spec is not None
        sharding = jax.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(shape, w.dtype, sharding=sharding)


def merged_arrays(lora: config.LoRA, params: Params) -> Params:
    """The model's parameters with their adapters added, one matrix at a time; NumPy arrays where they are such."""
    adapters, targets, scale = adapters_of(params), targets_of(lora, params), lora.alpha / lora.rank

    def joined(path: str, w: Any) -> Any:
        if path not in targets:
            return w
        sum_ = _merged(w, adapters[path], targets[path], scale)
        return jax.device_get(sum_) if isinstance(w, np.ndarray) else sum_

    return map_with_paths(joined, base_of(params))


_merged = jax.jit(merged, static_argnums=(2, 3))
