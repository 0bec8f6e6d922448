"""A model most of whose experts stay in host memory (see `hybridlm.ffns.moe.buffered`)."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jaxtyping import Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.moe.buffered import BufferedExperts, ExpertStore
from hybridlm.model import Params, build
from hybridlm.model.by_layer import layers_of, stack_of
from hybridlm.model.expert_usage import layers_with_experts, moes_of
from hybridlm.model.lm import LM, make_context


def buffered(
    params: Params,
    model: config.Model,
    kernels: config.Kernels,
    resident: Mapping[int, Int[np.ndarray, " e"]],
    sharding: jax.sharding.Sharding,
) -> tuple[Params, Callable[[Params], LM], ExpertStore]:
    """Parameters with the layout `sharding`, `bind(them) -> LM`, and where all but the `resident` experts are.

    `params` are the model's as NumPy arrays; `resident` has as many experts for every layer with experts, ascending.
    `sharding` is that of one device.
    """
    dtype = make_context(model, kernels).dtype
    layers = layers_of(params["stack"], model)
    store = ExpertStore({})
    buffers: list[Params] = [{} for _ in layers]
    for layer, ids in resident.items():
        experts = layers[layer]["ffn"]["experts"]
        for expert in set(range(len(experts["w_gate"]))) - set(ids.tolist()):
            w_gate, w_up, w_down = (experts[name][expert].astype(dtype) for name in ("w_gate", "w_up", "w_down"))
            store.weights[layer, expert] = w_gate, w_up, w_down
        kept = {name: w[ids] for name, w in experts.items()}
        layers[layer] = layers[layer] | {"ffn": layers[layer]["ffn"] | {"experts": kept}}
        buffers[layer] = {"ids": ids.astype(np.int32), "layer": np.asarray(layer, np.int32)}
    _, bind_plain = build(model, kernels)

    def bind(params: Params) -> LM:
        lm = bind_plain(params["lm"])
        for part, index, moe in moes_of(lm):
            buffer = params["buffers"][part][index]
            moe.experts = BufferedExperts(moe.experts, buffer["ids"], buffer["layer"], store)
        return lm

    placed = {"lm": params | {"stack": stack_of(layers, model)}, "buffers": stack_of(buffers, model)}
    return jax.tree.map(lambda x: jax.device_put(x, sharding), placed), bind, store


def check_resident(model: config.Model, num: int) -> None:
    """Raise ConfigError where not every layer has so many experts, or none has any."""
    layers = layers_with_experts(model)
    if not layers:
        raise ConfigError("--resident-experts", f"={num}: no layer of this run has experts; leave it out")
    fewest = min(layers.values())
    if not 1 <= num <= fewest:
        raise ConfigError("--resident-experts", f"={num}: must be at least 1 and at most num_experts={fewest}")
