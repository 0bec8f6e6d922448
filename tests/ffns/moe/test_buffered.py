"""Experts in host memory: the same outputs as with all on the device, fewer bytes there, and no fetch too many.

Letters: r rows, x experts, d model width.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybridlm
from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.ffns.moe.buffered import BufferedExperts, ExpertStore
from hybridlm.ffns.moe.experts import Experts
from hybridlm.generate import Sampling, generate
from hybridlm.mixers.base import Context
from hybridlm.model.expert_usage import count_choices
from hybridlm.run import USAGE_SEQUENCES, Model

X, D, R = 5, 12, 23
MOE = config.MoE(num_experts=X, hidden=10)
CONTEXT = Context(width=D, num_layers=2, norm_eps=1e-6, dtype=jnp.dtype(jnp.float32), kernels=config.Kernels())


@pytest.mark.parametrize("resident", [[3], [0, 4], [1, 2, 3], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 7, 1, 5, 7), (0, 9, 0, 4, 2), (0, 0, 0, 0, 0), (R, 0, 0, 0, 0)], ids=lambda sizes: str(sum(sizes))
)
def test_rows_are_those_of_experts_that_are_all_resident(
    sizes: tuple[int, ...], resident: list[int], rng: np.random.Generator
) -> None:
    graphdef, like = nnx.split(jax.eval_shape(lambda: Experts(MOE, CONTEXT, nnx.Rngs(params=jax.random.key(0)))))
    weights = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in nnx.to_pure_dict(like).items()}
    names = ("w_gate", "w_up", "w_down")
    missing = set(range(X)) - set(resident)
    store = ExpertStore({(7, e): tuple(weights[name][e] for name in names) for e in missing})  # pyright: ignore[reportArgumentType]
    rows = rng.standard_normal((R, D)).astype(np.float32)

    @jax.jit
    def run(weights: Any, kept: Any, rows: Any, sizes: Any) -> Any:
        whole = nnx.merge(graphdef, weights)
        buffered = BufferedExperts(nnx.merge(graphdef, kept), jnp.asarray(resident), jnp.int32(7), store)
        return tuple(each.grouped(each.weights(rows.dtype), rows, sizes) for each in (whole, buffered))

    kept = {name: w[np.asarray(resident)] for name, w in weights.items()}
    want, got = jax.block_until_ready(run(weights, kept, rows, jnp.asarray(sizes)))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert store.num_fetched == sum(sizes[e] > 0 for e in missing)
    assert store.bytes_fetched == store.num_fetched * 3 * 4 * D * MOE.hidden


@pytest.fixture(scope="module")
def usage(moe_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of experts 1 and 2 in every layer, to be the resident ones."""
    path = tmp_path_factory.mktemp("usage") / "usage.json"
    layers = {0: 4, 1: 6, 3: 6, 5: 6}
    entries = [{"layer": i, "share": [0.5 * (e in (1, 2)) for e in range(x)]} for i, x in layers.items()]
    path.write_text(json.dumps({"layers": entries}))
    return path


@pytest.fixture(scope="module")
def whole(moe_run: Path) -> Model:
    return hybridlm.load(moe_run)[0]


@pytest.fixture(scope="module")
def two_resident(moe_run: Path, usage: Path) -> Model:
    return hybridlm.load(moe_run, resident_experts=2, usage=usage)[0]


def num_bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_logits_and_fetches_of_a_whole_model(whole: Model, two_resident: Model, moe_config: config.Config) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 9)), jnp.int32)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.asarray(positions)}
    counts = count_choices(whole.bind, whole.params, [batch], moe_config.model)
    store = two_resident.store
    assert store is not None and whole.store is None
    before = store.num_fetched
    got, _ = two_resident(tokens)
    np.testing.assert_allclose(got, whole(tokens)[0], rtol=1e-4, atol=1e-4)
    missed = [sum(n > 0 for e, n in enumerate(row) if e not in (1, 2)) for row in counts.values()]
    assert store.num_fetched - before == sum(missed) > 4


def test_only_resident_experts_are_on_the_device(whole: Model, moe_run: Path, usage: Path) -> None:
    held = {id(x) for x in jax.live_arrays()}
    model, _, _ = hybridlm.load(moe_run, resident_experts=2, usage=usage)
    new = [x for x in jax.live_arrays() if id(x) not in held]
    saved = (4 - 2) * 3 * 16 * 12 + 3 * (6 - 2) * 3 * 16 * 8  # experts of three matrices of width x hidden
    on_device = num_bytes(model.params["lm"])
    assert on_device == num_bytes(whole.params) - 4 * saved
    assert all(isinstance(x, jax.Array) and len(x.devices()) == 1 for x in jax.tree.leaves(model.params))
    assert num_bytes(new) == num_bytes(model.params)
    assert num_bytes(model.params["buffers"]) == 4 * 4 * (2 + 1)  # ids and numbers of four layers
    assert model.store is not None
    assert sum(num_bytes(w) for w in model.store.weights.values()) == 4 * saved


@pytest.mark.slow
def test_generated_text_is_the_same(whole: Model, two_resident: Model, moe_run: Path) -> None:
    tokenizer = hybridlm.load(moe_run)[1]
    greedy = Sampling(temperature=0.0)
    texts = [
        list(generate(model, tokenizer, b"a dog", max_new_tokens=9, sampling=greedy)) for model in (whole, two_resident)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_without_a_file_the_hottest_on_held_out_text_are_resident(moe_run: Path, whole: Model) -> None:
    model, _, cfg = hybridlm.load(moe_run, resident_experts=3)
    batches = evaluation_batches(
        load_corpus(cfg.data).validation, batch_size=8, sharding=None, limit=USAGE_SEQUENCES // 8
    )
    counts = count_choices(whole.bind, whole.params, batches, cfg.model)
    buffers = model.params["buffers"]
    got = {0: buffers["prologue"][0], 5: buffers["tail"][0]} | {
        layer: {name: x[repeat] for name, x in buffers["repeats"][0].items()} for repeat, layer in enumerate((1, 3))
    }
    assert got.keys() == counts.keys()
    for layer, row in counts.items():
        assert int(got[layer]["layer"]) == layer
        hottest = sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:3]
        assert got[layer]["ids"].tolist() == sorted(hottest)
    assert model.store is not None and model.store.num_fetched == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no usage of experts"),
        ("[]", "is no usage of experts"),
        ('{"layers": [{"layer": 0}]}', "is no usage of experts"),
        ('{"layers": [{"layer": 0, "share": [1, 0, 0, 0]}]}', "other layers or numbers of experts"),
    ],
)
def test_a_wrong_file_of_usage(moe_run: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "usage.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        hybridlm.load(moe_run, resident_experts=2, usage=tmp_path / "usage.json")
