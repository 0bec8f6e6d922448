"""Pruned models against the whole ones whose dropped experts are never chosen, and scores against loops."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.model.by_layer import layers_of
from hybridlm.model.prune import prune, pruned_model

KERNELS = config.Kernels()
X, KEEP = 5, 3
MIXER = config.Attention(num_heads=2, num_kv_heads=1, window=4)
MOE = config.MoE(num_experts=X, hidden=10, router=config.TopK(k=2, score="sigmoid", bias_balance=True), shared_hidden=6)
BLOCK = config.Block(mixer=MIXER, ffn=MOE)
MODEL = config.Model(
    vocab_size=40,
    width=16,
    num_layers=4,
    prologue=(BLOCK,),
    pattern=(config.Block(mixer=MIXER, ffn=config.SwiGLU(hidden=8)), BLOCK),
)
LAYERS = (0, 2)


def random_params(model: config.Model, rng: np.random.Generator) -> Any:
    shapes = jax.eval_shape(lambda: build(model, KERNELS)[0](jax.random.key(0)))
    return jax.tree.map(lambda x: 0.4 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def logits(model: config.Model, params: Any) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 11)), jnp.int32)
    _, bind = build(model, KERNELS)
    return np.asarray(jax.jit(lambda params: bind(params)(tokens)[0])(params))


def kept_experts(params: Any, start: Any, layer: int) -> list[int]:
    """By loops, in float64."""
    after, before = (layers_of(p["stack"], MODEL)[layer]["ffn"]["router"]["gate"]["w"] for p in (params, start))
    scores = []
    for e in range(X):
        now, then = (np.sqrt(sum(float(v) ** 2 for v in w[:, e])) for w in (after, before))
        scores.append(abs(now - then))
    return sorted(sorted(range(X), key=lambda e: -scores[e])[:KEEP])


def test_experts_whose_router_norms_changed_most_stay(rng: np.random.Generator) -> None:
    params, start = random_params(MODEL, rng), random_params(MODEL, rng)
    pruned, model = prune(params, start, MODEL, KEEP)
    chosen = []
    for layer in LAYERS:
        kept = kept_experts(params, start, layer)
        before, after = (layers_of(p["stack"], m)[layer]["ffn"] for p, m in ((params, MODEL), (pruned, model)))
        for name in ("w_gate", "w_up", "w_down"):
            np.testing.assert_array_equal(after["experts"][name], before["experts"][name][kept])
        np.testing.assert_array_equal(after["router"]["gate"]["w"], before["router"]["gate"]["w"][:, kept])
        np.testing.assert_array_equal(after["router"]["balance_bias"], before["router"]["balance_bias"][kept])
        jax.tree.map(np.testing.assert_array_equal, after["shared_expert"], before["shared_expert"])
        chosen.append(kept)
    assert chosen[0] != chosen[1]
    assert [block.ffn for block in model.blocks()][::2] == [replace(MOE, num_experts=KEEP)] * 2


def test_the_pruned_model_is_the_whole_one_that_never_chooses_the_others(rng: np.random.Generator) -> None:
    params, start = random_params(MODEL, rng), random_params(MODEL, rng)
    pruned, model = prune(params, start, MODEL, KEEP)
    whole = jax.tree.map(np.copy, params)
    for layer, part in ((0, whole["stack"]["prologue"][0]), (2, whole["stack"]["repeats"][1])):
        bias = part["ffn"]["router"]["balance_bias"]
        dropped = [e for e in range(X) if e not in kept_experts(params, start, layer)]
        bias[..., dropped] = -1e6  # it selects and does nothing else
    got, want, unpruned = logits(model, pruned), logits(MODEL, whole), logits(MODEL, params)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.abs(got - unpruned).max() > 0.01


@pytest.mark.parametrize(
    ("moe", "keep", "path", "text"),
    [
        (MOE, 0, "prologue.0.ffn.num_experts", "=5: cannot keep 0 of them"),
        (MOE, 6, "prologue.0.ffn.num_experts", "=5: cannot keep 6 of them"),
        (MOE, 1, "prologue.0.ffn.router.k", "=2: must be at most num_experts=1"),
        (
            replace(MOE, router=config.NoisyTopK(k=2)),
            2,
            "prologue.0.ffn.router.k",
            "=2: must be below num_experts=2",
        ),
        (replace(MOE, router=config.HashRouter()), 3, "prologue.0.ffn.router", ": HashRouter has no vector"),
        (replace(MOE, router=config.DSelectK()), 3, "prologue.0.ffn.router", ": DSelectK has no vector"),
        (replace(MOE, router=config.PreGated()), 3, "prologue.0.ffn.router", ": PreGated has no vector"),
        (
            replace(MOE, router=config.TopK(gate=config.GRKANGate())),
            3,
            "prologue.0.ffn.router.gate",
            ": GRKANGate has no vector per expert",
        ),
        (
            replace(MOE, num_experts=4, router=config.TopK(num_groups=2)),
            2,
            "prologue.0.ffn.router.num_groups",
            "=2: pruning would take experts",
        ),
    ],
)
def test_what_cannot_be_pruned(moe: config.MoE, keep: int, path: str, text: str) -> None:
    block = config.Block(mixer=MIXER, ffn=moe)
    with pytest.raises(ConfigError) as error:
        pruned_model(replace(MODEL, prologue=(block,), pattern=(block,)), keep)
    assert error.value.path == path
    assert error.value.message.startswith(text.removeprefix(path)) or text in error.value.message


@pytest.mark.parametrize(
    "router",
    [config.NoisyTopK(k=2), config.Switch(), config.GShardTop2(), config.AdaptiveTopK(), config.DenseToSparse()],
    ids=lambda router: type(router).__name__,
)
def test_every_parameter_of_these_routers_has_a_place_per_expert(router: Any, rng: np.random.Generator) -> None:
    model = replace(MODEL, prologue=(), pattern=(replace(BLOCK, ffn=replace(MOE, router=router)),), num_layers=2)
    params = random_params(model, rng)
    pruned, smaller = prune(params, random_params(model, rng), model, KEEP)
    wanted = jax.eval_shape(lambda: build(smaller, KERNELS)[0](jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, pruned) == jax.tree.map(lambda x: x.shape, wanted)


def test_a_model_without_experts_cannot_be_pruned() -> None:
    dense = replace(MODEL, prologue=(), pattern=MODEL.pattern[:1])
    with pytest.raises(ConfigError, match="no layer has experts"):
        pruned_model(dense, 1)
