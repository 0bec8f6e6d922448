"""The language model around its blocks: scan, remainders, rematerialisation, head, state, compile size.

Letters: b batch, t time, d model width, v vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybridlm import config
from hybridlm.ffns import FFNS
from hybridlm.ffns.base import Pass
from hybridlm.losses import token_losses
from hybridlm.mixers.base import Context, Segments
from hybridlm.model import build
from hybridlm.model.stack import REMAT_POLICIES

B, T, V, D = 3, 21, 19, 16
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative L2, float32 against float32

recurrent = config.Block(mixer=config.RGLRU(width=20, num_heads=2), ffn=config.GeGLU(hidden=24))
local = config.Block(mixer=config.Attention(num_heads=2, num_kv_heads=1, window=6), ffn=config.SwiGLU(hidden=24))
SMALL = config.Model(vocab_size=V, width=D, num_layers=4, pattern=(recurrent, local))
bare = config.Block(mixer=config.Attention(num_heads=2, num_kv_heads=2), ffn=None)
# A prologue, two and a half repeats, an epilogue.
MODEL = config.Model(
    vocab_size=V, width=D, num_layers=7, pattern=(recurrent, local), prologue=(bare,), epilogue=(recurrent,)
)
IDS = np.array([[1] * T, [4] * 9 + [5] * 12, [0] * 3 + [1] * 7 + [2] * 8 + [0] * 3], np.int32)


def params_of(model: config.Model, seed: int = 5) -> tuple[Any, Any]:
    """Parameters, all away from their constants, and `bind`."""
    init, bind = build(model, config.Kernels())
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda a: 0.3 * rng.standard_normal(a.shape).astype(np.float32), like), bind


def forward(model: config.Model, params: Any, tokens: Any, ids: Any = IDS) -> np.ndarray:
    _, bind = build(model, config.Kernels())
    return jax.jit(lambda params, tokens, ids: bind(params)(tokens, ids)[0])(params, tokens, ids)


@pytest.fixture
def tokens(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, V, (B, T), dtype=np.int32)


def unscanned(model: config.Model, params: Any) -> tuple[config.Model, Any]:
    """The same blocks one after another in the prologue: no pattern is scanned."""
    stack = params["stack"]
    size = len(model.pattern)
    repeats = (model.num_layers - len(model.prologue) - len(model.epilogue)) // size
    scanned = [jax.tree.map(lambda a, i=i: a[i], stack["repeats"][j]) for i in range(repeats) for j in range(size)]
    tail = [stack["tail"][i] for i in sorted(stack.get("tail", {}))]
    prologue, epilogue = ([stack[name][i] for i in sorted(stack.get(name, {}))] for name in ("prologue", "epilogue"))
    blocks = [*prologue, *scanned, *tail, *epilogue]
    middle = [model.pattern[i % size] for i in range(repeats * size + len(tail))]
    flat = replace(model, prologue=(*model.prologue, *middle, *model.epilogue), epilogue=())
    return flat, {**params, "stack": {"prologue": dict(enumerate(blocks))}}


def test_scan_equals_one_block_after_another(tokens: np.ndarray) -> None:
    params, _ = params_of(MODEL)
    assert set(params["stack"]) == {"prologue", "repeats", "tail", "epilogue"}
    flat_model, flat_params = unscanned(MODEL, params)
    assert distance(forward(MODEL, params, tokens), forward(flat_model, flat_params, tokens)) < FORWARD_TOLERANCE


@pytest.mark.parametrize("num_layers", [2, 3, 4, 5, 6])
def test_every_depth_has_that_many_blocks(num_layers: int) -> None:
    """Two fixed blocks around a pattern of two: nothing, a part, one repeat, and more."""
    params, _ = params_of(replace(MODEL, num_layers=num_layers))
    stack = params["stack"]
    repeated = len(stack["repeats"]) * len(jax.tree.leaves(stack["repeats"])[0]) if "repeats" in stack else 0
    assert sum(len(stack.get(name, ())) for name in ("prologue", "tail", "epilogue")) + repeated == num_layers


def test_residual_blocks_are_what_the_docstring_says(tokens: np.ndarray) -> None:
    """Head and blocks by hand: embedding, x += ffn(norm(x)), norm, tied head with a soft cap."""
    model = config.Model(vocab_size=V, width=D, num_layers=1, pattern=(local,), logit_soft_cap=3.0)
    params, _ = params_of(model)
    block = params["stack"]["repeats"][0]
    block["mixer"]["w_o"] *= 0  # leaves the FFN
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    f = jax.tree.map(lambda a: a[0], p["stack"]["repeats"][0])

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + scale)

    x = p["embedding"][tokens] * np.sqrt(D)
    z = norm(x, f["ffn_norm"]["scale"])
    gate = z @ f["ffn"]["gate"]["w"]
    x = x + (gate / (1 + np.exp(-gate)) * (z @ f["ffn"]["up"]["w"])) @ f["ffn"]["down"]["w"]
    want = 3.0 * np.tanh(norm(x, p["norm"]["scale"]) @ p["embedding"].T / 3.0)
    assert distance(forward(model, params, tokens), want) < FORWARD_TOLERANCE


def test_untied_unscaled_model_has_its_own_head(tokens: np.ndarray) -> None:
    tied = config.Model(vocab_size=V, width=D, num_layers=1, pattern=(local,))
    untied = replace(tied, tied_embedding=False, scale_embedding=False)
    params, _ = params_of(tied)
    embedding = params["embedding"]
    other = {**params, "embedding": embedding * np.sqrt(D).astype(np.float32), "w_head": embedding.T}
    assert jax.tree.structure(other) == jax.tree.structure(params_of(untied)[0])
    assert distance(forward(untied, other, tokens), forward(tied, params, tokens)) < FORWARD_TOLERANCE


def test_embeddings_are_multiplied_by_what_the_config_says(tokens: np.ndarray) -> None:
    scaled = config.Model(
        vocab_size=V, width=D, num_layers=1, pattern=(local,), tied_embedding=False, embedding_scale=3.0
    )
    params, _ = params_of(scaled)
    other = {**params, "embedding": 3.0 * params["embedding"]}
    plain = replace(scaled, scale_embedding=False, embedding_scale=None)
    assert distance(forward(scaled, params, tokens), forward(plain, other, tokens)) < FORWARD_TOLERANCE


def test_norms_without_an_offset_multiply_by_their_scale(tokens: np.ndarray) -> None:
    mixer = config.Attention(num_heads=2, num_kv_heads=1, qk_norm=True)
    offset = config.Model(vocab_size=V, width=D, num_layers=1, pattern=(config.Block(mixer=mixer, ffn=local.ffn),))
    plain = replace(offset, norm_offset=False)
    params, _ = params_of(offset)

    def with_one(path: tuple[Any, ...], x: np.ndarray) -> np.ndarray:
        return x + np.float32(path[-1].key == "scale")

    other = jax.tree_util.tree_map_with_path(with_one, params)
    assert distance(forward(plain, other, tokens), forward(offset, params, tokens)) < FORWARD_TOLERANCE
    # Both start as the same function.
    fresh = [build(model, config.Kernels())[0](jax.random.key(0)) for model in (offset, plain)]
    assert distance(forward(plain, fresh[1], tokens), forward(offset, fresh[0], tokens)) < FORWARD_TOLERANCE


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_rematerialisation_changes_no_number(remat: Any, tokens: np.ndarray) -> None:
    params, _ = params_of(SMALL)
    loss, grads = value_and_gradients(SMALL, params, tokens)
    remat_loss, remat_grads = value_and_gradients(replace(SMALL, remat=remat), params, tokens)
    assert remat_loss == pytest.approx(loss, rel=1e-6)
    for a, b in zip(jax.tree.leaves(remat_grads), jax.tree.leaves(grads), strict=True):
        assert distance(a, b) < GRADIENT_TOLERANCE


def test_full_rematerialisation_saves_memory() -> None:
    """Else the policies could agree because none is applied."""
    deep = replace(SMALL, num_layers=20, pattern=(local,))

    def temporary_bytes(model: config.Model) -> int:
        init, bind = build(model, config.Kernels())
        params = jax.eval_shape(init, jax.random.key(0))
        batch = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        lowered = jax.jit(jax.grad(lambda p, x: jnp.sum(bind(p)(x)[0] ** 2))).lower(params, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(replace(deep, remat="full")) < 0.5 * temporary_bytes(deep)


def test_state_over_calls_equals_the_whole(tokens: np.ndarray) -> None:
    cuts = (1, 11)  # a single token, and twice the same length
    params, bind = params_of(MODEL)
    step = jax.jit(lambda params, tokens, ids, state: bind(params)(tokens, ids, state))
    state, parts = jax.jit(lambda params: bind(params).init_state(B, T))(params), []
    for first, last in zip((0, *cuts), (*cuts, T), strict=True):
        logits, state = step(params, tokens[:, first:last], IDS[:, first:last], state)
        parts.append(logits)
    real = (IDS != 0)[:, :, None]
    assert distance(np.concatenate(parts, axis=1) * real, forward(MODEL, params, tokens) * real) < FORWARD_TOLERANCE
    np.testing.assert_array_equal(state["id"], [1, 5, 2])
    np.testing.assert_array_equal(state["position"], [T, 12, 8])


def test_another_id_starts_a_document_in_a_used_state(tokens: np.ndarray) -> None:
    params, bind = params_of(SMALL)
    step = jax.jit(lambda params, tokens, ids, state: bind(params)(tokens, ids, state))
    fresh = jax.jit(lambda params: bind(params).init_state(B, 2 * T))(params)
    _, used = step(params, tokens, np.ones((B, T), np.int32), fresh)
    other = np.full((B, T), 2, np.int32)
    got, _ = step(params, tokens[::-1], other, used)
    want, _ = step(params, tokens[::-1], other, fresh)
    assert distance(got, want) < FORWARD_TOLERANCE
    same, _ = step(params, tokens[::-1], np.ones((B, T), np.int32), used)
    assert distance(same, want) > 0.01


def test_program_does_not_grow_with_depth() -> None:
    """Lowered size of a loss and its gradient at 8 and 64 layers of a pattern of two: exact, where seconds are not."""

    def size(num_layers: int) -> int:
        model = config.Model(vocab_size=V, width=D, num_layers=num_layers, pattern=(recurrent, local))
        init, bind = build(model, config.Kernels())
        params = jax.eval_shape(init, jax.random.key(0))
        batch = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        return len(jax.jit(jax.grad(lambda p, x: jnp.sum(bind(p)(x)[0]))).lower(params, batch).as_text())

    assert size(64) < 1.02 * size(8)


@dataclass(frozen=True, kw_only=True)
class Counting(config.FFN):
    """Reports a number and a loss, and adds nothing."""

    number: float


class CountingFFN(nnx.Module):
    def __init__(self, cfg: Counting, context: Context, rngs: nnx.Rngs):
        self.number = cfg.number

    def __call__(self, x: Any, segments: Segments, carry: Any, given: Pass) -> Any:
        seen = carry.get("seen", 0.0)
        aux = {"number": jnp.float32(self.number)}
        if self.number > 5:
            aux["large_loss"] = jnp.float32(self.number)
        return 0 * x, aux, carry if not carry else {"seen": seen + 1.0}

    @staticmethod
    def flops(cfg: Counting, context: Context) -> int:
        return 0


@pytest.fixture
def counting() -> Iterator[None]:
    FFNS.register(Counting, CountingFFN, examples=())
    yield
    del FFNS.entries[Counting]


@pytest.mark.usefixtures("counting")
def test_aux_values_come_in_the_order_of_the_layers_that_report_them(tokens: np.ndarray) -> None:
    def block(number: float) -> config.Block:
        return config.Block(mixer=local.mixer, ffn=Counting(number=number))

    # 10; (1, 2) twice; 1 of the third repeat; a block without FFN.
    model = replace(MODEL, pattern=(block(1.0), block(2.0)), prologue=(block(10.0),), epilogue=(bare,))
    params, bind = params_of(model)

    @jax.jit
    def run(params: Any, tokens: Any) -> Any:
        segments = Segments(jnp.asarray(IDS), jnp.asarray(IDS))
        return bind(params).features(tokens, segments)[2]

    aux = run(params, tokens)
    assert {name: value.tolist() for name, value in aux.items()} == {
        "number": [10.0, 1.0, 2.0, 1.0, 2.0, 1.0],
        "large_loss": [10.0],
    }


@pytest.mark.usefixtures("counting")
def test_carry_goes_through_every_block(rng: np.random.Generator) -> None:
    counted = config.Block(mixer=local.mixer, ffn=Counting(number=1.0))
    params, bind = params_of(replace(MODEL, pattern=(counted, counted), prologue=(counted,), epilogue=(bare,)))
    x = rng.standard_normal((B, T, D)).astype(np.float32)

    @jax.jit
    def run(params: Any, x: Any) -> Any:
        segments = Segments(jnp.asarray(IDS), jnp.asarray(IDS))
        return bind(params).stack(x, segments, None, {"seen": jnp.float32(0)}, Pass(jnp.asarray(IDS)))[2]

    assert float(run(params, x)["seen"]) == 6.0


def test_bfloat16_is_near_float32(tokens: np.ndarray) -> None:
    params, _ = params_of(SMALL)
    got = forward(replace(SMALL, dtype="bfloat16"), params, tokens)
    assert got.dtype == jnp.float32
    assert 1e-5 < distance(got, forward(SMALL, params, tokens)) < 0.05


def value_and_gradients(model: config.Model, params: Any, tokens: Any) -> tuple[float, Any]:
    _, bind = build(model, config.Kernels())

    def objective(params: Any, tokens: Any, ids: Any) -> Any:
        lm = bind(params)
        positions = jnp.cumsum(ids != 0, axis=1)
        x, _, _ = lm.features(tokens, Segments(ids, positions))
        nll, _ = token_losses(lm.head(), x, jnp.roll(tokens, -1, axis=1))
        return jnp.mean(nll * (ids != 0))

    loss, grads = jax.jit(jax.value_and_grad(objective))(params, tokens, IDS)
    return float(loss), grads


def distance(got: Any, want: Any) -> float:
    """Relative L2."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


@pytest.mark.parametrize("check_values", [False, True])
def test_values_are_checked_when_the_config_says_so(check_values: bool) -> None:
    mixer = config.DeltaNet(num_heads=2, head_dim=8)
    model = config.Model(vocab_size=8, width=16, num_layers=1, pattern=(config.Block(mixer=mixer, ffn=None),))
    init, bind = build(model, config.Kernels(check_values=check_values))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    params = jax.eval_shape(init, jax.random.key(0))
    traced = jax.make_jaxpr(lambda params, tokens: bind(params)(tokens)[0])(params, tokens)
    assert ("debug_callback" in str(traced)) == check_values
