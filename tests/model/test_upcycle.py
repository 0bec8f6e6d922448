"""Upcycled models against the dense model they come from, and their experts against slices of its MLPs.

Letters: x experts, m slices of an MLP.
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.model.by_layer import drawn, field_of, layers_of, stack_of
from hybridlm.model.upcycle import same_function, sum_of_weights, upcycle

KERNELS = config.Kernels()
LOCAL = config.Attention(num_heads=2, num_kv_heads=1, window=4)
GLOBAL = config.Attention(num_heads=2, num_kv_heads=2)
MLP = config.GeGLU(hidden=24)
X = 6
EXPERTS = config.MoE(num_experts=X, hidden=24, router=config.TopK(), activation="GeGLU")
TOLERANCE = 1e-5  # relative L2: float32, and weights whose sum is 1 up to rounding

DENSE = config.Model(
    vocab_size=40,
    width=16,
    num_layers=5,
    pattern=(config.Block(mixer=LOCAL, ffn=MLP), config.Block(mixer=GLOBAL, ffn=None)),
)
PLAIN = replace(DENSE, num_layers=2, pattern=DENSE.pattern[:1])


def sparse(experts: config.MoE, **changes: Any) -> config.Model:
    """`DENSE` with experts, its layers split into other parts."""
    block, other = config.Block(mixer=LOCAL, ffn=experts), DENSE.pattern[1]
    parts = dict(prologue=(block,), pattern=(other, block, other), epilogue=(block,))
    return replace(DENSE, **(parts | changes))


def random_params(model: config.Model) -> Any:
    shapes = jax.eval_shape(lambda: build(model, KERNELS)[0](jax.random.key(0)))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: np.float32(0.3) * draw(x.shape, np.float32), shapes)


@functools.cache
def dense_params() -> Any:
    return random_params(DENSE)


@functools.cache
def plain() -> tuple[Any, np.ndarray]:
    """Parameters of `PLAIN`, and its logits."""
    params = random_params(PLAIN)
    return params, logits(PLAIN, params)


def logits(model: config.Model, params: Any) -> np.ndarray:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 11)), jnp.int32)
    _, bind = build(model, KERNELS)
    return np.asarray(jax.jit(lambda params: bind(params)(tokens)[0])(params), np.float64)


def upcycled_plain(router: config.Router, **changes: Any) -> tuple[bool, np.ndarray]:
    """Whether it should be the same function as `PLAIN`, and the logits of what it was upcycled to."""
    block = config.Block(mixer=LOCAL, ffn=replace(EXPERTS, router=router, **changes))
    model = replace(PLAIN, pattern=(block,))
    params = upcycle(plain()[0], PLAIN, model, jax.random.key(1))
    return same_function(PLAIN, model), logits(model, params)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_layers_of_a_stack_and_back() -> None:
    """Every layer has the parameters of its block, and none is lost or doubled."""
    model = replace(sparse(EXPERTS), num_layers=9)
    shapes = jax.eval_shape(lambda: build(model, KERNELS)[0](jax.random.key(0)))["stack"]
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    stack = structure.unflatten(
        [np.arange(end - leaf.size, end).reshape(leaf.shape) for leaf, end in zip(leaves, ends, strict=True)]
    )
    layers = layers_of(stack, model)
    assert sorted(np.concatenate([x.ravel() for x in jax.tree.leaves(layers)])) == list(range(ends[-1]))
    for layer, block in zip(layers, model.blocks(), strict=True):
        assert ("ffn" in layer) == (block.ffn is not None)
        assert layer["mixer"]["w_k"].shape[1] == block.mixer.num_kv_heads
    jax.tree.map(np.testing.assert_array_equal, stack_of(layers, model), stack)
    fields = [field_of(model, i) for i in range(9)]
    assert fields == ["prologue.0", *("pattern.0", "pattern.1", "pattern.2") * 2, "pattern.0", "epilogue.0"]


def test_what_is_drawn_alone_is_what_a_new_model_has() -> None:
    model = replace(PLAIN, pattern=(config.Block(mixer=LOCAL, ffn=replace(EXPERTS, shared_hidden=5)),))
    init, _ = build(model, KERNELS)
    whole, part = jax.jit(init)(jax.random.key(3)), drawn(init, jax.random.key(3), ("router", "shared_expert"))
    got, want = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (part, whole))
    names = {jax.tree_util.keystr(path[-2:], simple=True, separator=".") for path in got}
    assert names == {"gate.w", "up.w", "down.w"} and len(got) == 4
    for path, x in got.items():
        np.testing.assert_array_equal(x, want[path])


@pytest.mark.parametrize(
    ("router", "changes"),
    [
        (config.TopK(k=3, scale=2.5), {"shared_hidden": 5}),
        (config.TopK(k=2, score="sigmoid", bias_balance=True, gate=config.RecurrentGate(state_dim=6)), {}),
        (config.NoisyTopK(k=2), {}),
        (config.GShardTop2(), {}),
        (config.HashRouter(k=2), {}),
        (config.DSelectK(), {}),
        (config.Comet(), {}),
        (config.PreGated(router=config.TopK(k=2)), {}),
        (config.TopK(k=4, scale=1.5), {"hidden": 12}),
        (config.TopK(k=3, num_groups=2, top_groups=1), {"hidden": 8}),
        (config.PreGated(router=config.TopK(k=2)), {"hidden": 12}),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, config.Router) else str(value),
)
def test_the_same_function(router: Any, changes: Any) -> None:
    same, got = upcycled_plain(router, **changes)
    assert same
    assert distance(got, plain()[1]) < TOLERANCE


def test_the_same_function_where_layers_lie_in_other_parts() -> None:
    model = sparse(replace(EXPERTS, hidden=12))
    params = upcycle(dense_params(), DENSE, model, jax.random.key(1))
    assert distance(logits(model, params), logits(DENSE, dense_params())) < TOLERANCE


@pytest.mark.parametrize(
    ("router", "hidden"),
    [
        (config.Switch(), 24),
        (config.TopK(k=2, renormalize=False), 24),
        (config.TopK(k=3), 12),
        (config.TopK(k=2, gate=config.GRKANGate(hidden=4)), 12),
        (config.TopK(k=3, num_groups=2, top_groups=1), 4),
        (config.HashRouter(k=2), 12),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, config.Router) else str(value),
)
def test_a_start_that_is_not_the_same_function(router: Any, hidden: int) -> None:
    same, got = upcycled_plain(router, hidden=hidden)
    assert not same
    assert distance(got, plain()[1]) > 1e-3


def test_experts_are_the_slices_of_the_mlp() -> None:
    model = sparse(replace(EXPERTS, hidden=8, router=config.TopK(k=3, scale=2.0)))
    params = upcycle(dense_params(), DENSE, model, jax.random.key(1))
    for before, after in zip(layers_of(dense_params()["stack"], DENSE), layers_of(params["stack"], model), strict=True):
        np.testing.assert_array_equal(after["mixer"]["w_q"], before["mixer"]["w_q"])
        if "ffn" not in after:
            continue
        mlp, experts = before["ffn"], after["ffn"]["experts"]
        for e in range(X):
            part = slice(8 * (e % 3), 8 * (e % 3) + 8)
            np.testing.assert_array_equal(experts["w_gate"][e], mlp["gate"]["w"][:, part])
            np.testing.assert_array_equal(experts["w_up"][e], mlp["up"]["w"][:, part])
            np.testing.assert_allclose(experts["w_down"][e], 3 / 2.0 * mlp["down"]["w"][part], rtol=1e-6)
    np.testing.assert_array_equal(params["embedding"], dense_params()["embedding"])


def test_masks_differ_between_experts() -> None:
    model = sparse(replace(EXPERTS, router=config.TopK(k=2)))
    params = upcycle(dense_params(), DENSE, model, jax.random.key(1), mask_fraction=0.4)
    before, after = layers_of(dense_params()["stack"], DENSE)[2], layers_of(params["stack"], model)[2]
    names = {"gate": "w_gate", "up": "w_up", "down": "w_down"}
    zeros = np.stack([after["ffn"]["experts"][name].reshape(X, -1) == 0 for name in names.values()], axis=1)
    assert np.all(np.abs(zeros.mean(axis=(1, 2)) - 0.4) < 0.06)  # four standard deviations of 1,152 draws
    shared = (zeros[:, None] & zeros[None]).mean(axis=(2, 3))
    assert np.all(np.abs(shared[~np.eye(X, dtype=bool)] - 0.16) < 0.06)
    for mlp, name in names.items():
        kept = after["ffn"]["experts"][name]
        whole = np.broadcast_to(before["ffn"][mlp]["w"], kept.shape)
        np.testing.assert_array_equal(kept, np.where(kept == 0, 0, whole))


@pytest.mark.parametrize(
    ("model", "path", "text"),
    [
        (sparse(EXPERTS, width=32), "width", "=32: the dense model has 16"),
        (sparse(EXPERTS, num_layers=6), "num_layers", "=6: the dense model has 5"),
        (sparse(EXPERTS, tied_embedding=False), "tied_embedding", "=False: the dense model has True"),
        (sparse(EXPERTS, prologue=()), "pattern.0.mixer", "layer 0 is Attention, the same mixer with other fields"),
        (
            sparse(EXPERTS, prologue=(config.Block(mixer=config.RGLRU(width=16, num_heads=2), ffn=EXPERTS),)),
            "prologue.0.mixer",
            "layer 0 is RGLRU, another mixer than the dense model's Attention",
        ),
        (sparse(replace(EXPERTS, activation="SwiGLU")), "prologue.0.ffn.activation", "the dense model has GeGLU"),
        (sparse(replace(EXPERTS, hidden=10)), "prologue.0.ffn.hidden", "=10: must divide"),
        (sparse(replace(EXPERTS, hidden=6)), "prologue.0.ffn.num_experts", "=6: must divide by the 4 slices"),
        (
            sparse(EXPERTS, epilogue=(config.Block(mixer=LOCAL, ffn=None),)),
            "epilogue.0.ffn",
            "is none, the dense model's GeGLU",
        ),
        (DENSE, "pattern", "is the dense model's"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_models_that_do_not_fit(model: config.Model, path: str, text: str) -> None:
    with pytest.raises(ConfigError) as error:
        upcycle({}, DENSE, model, jax.random.key(0))
    assert error.value.path == path
    assert text in error.value.message


def test_what_else_is_refused() -> None:
    biased = replace(DENSE, pattern=(config.Block(mixer=LOCAL, ffn=replace(MLP, bias=True)), DENSE.pattern[1]))
    with pytest.raises(ConfigError, match="prologue.0.ffn: the dense model's MLP has biases"):
        upcycle({}, biased, sparse(EXPERTS), jax.random.key(0))
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="mask_fraction=.*: must be at least 0 and below 1"):
            upcycle(dense_params(), DENSE, sparse(EXPERTS), jax.random.key(0), mask_fraction=fraction)


def test_sums_of_weights_are_none_where_tokens_differ() -> None:
    assert sum_of_weights(config.AdaptiveTopK()) is None
    assert sum_of_weights(config.DenseToSparse()) is None
    assert sum_of_weights(config.ExpertChoice(leaks_future=True)) is None
    assert sum_of_weights(config.PreGated(router=config.TopK(scale=2.5))) == 2.5
