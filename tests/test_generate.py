"""Generation: prefill, decoding and sampling against re-running the whole text and against NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from hybridlm import generate as generation
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import ByteTokenizer
from hybridlm.generate import Sampler, Sampling, beginning, generate, sample
from hybridlm.mixers.base import Segments
from hybridlm.model.compiled import Model

GREEDY = Sampling(temperature=0.0)
PROMPT = b"the cat sat. a dog ran. one bi"


@pytest.fixture(scope="module")
def loaded(trained_run: Path) -> tuple[Model, ByteTokenizer, Config]:
    return hybridlm.load(trained_run)


def padded_logits(model: Model, ids: list[int]) -> np.ndarray:
    """Logits after the last of `ids`, by a forward pass over all of them (one compiled shape)."""
    tokens, real = np.zeros((1, 64), np.int32), np.zeros((1, 64), np.int32)
    tokens[0, : len(ids)], real[0, : len(ids)] = ids, 1
    logits, state = model(jnp.asarray(tokens), jnp.asarray(real))
    assert state is None
    return np.asarray(logits[0, len(ids) - 1])


def test_a_prompt_begins_with_what_its_tokenizer_puts_before_text() -> None:
    class Llamas(ByteTokenizer):
        begin_id = 7

    assert beginning(Llamas(), b"ab").tolist() == [7, 97, 98]


def test_load_gives_the_model_the_tokenizer_and_the_config(loaded: Any, tiny_config: Config) -> None:
    model, tokenizer, config = loaded
    assert config == tiny_config
    assert isinstance(tokenizer, ByteTokenizer)
    tokens = jnp.asarray(np.frombuffer(PROMPT, np.uint8)[None].astype(np.int32))
    logits, state = model(tokens)
    lm = model.bind(model.params)
    positions = jnp.arange(tokens.shape[1])[None]
    x, _, _ = jax.jit(lambda t: lm.features(t, Segments(jnp.ones_like(t), positions)))(tokens)
    np.testing.assert_allclose(logits, lm.logits(x), rtol=1e-5, atol=1e-5)
    assert logits.dtype == jnp.float32
    assert logits.shape == (1, len(PROMPT), 264)
    assert state is None


def test_greedy_is_the_argmax_of_the_whole_text_run_again(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    out = list(generate(model, tokenizer, PROMPT, max_new_tokens=20, sampling=GREEDY))
    ids = [tokenizer.end_id, *PROMPT]
    for token in out:
        assert token == padded_logits(model, ids)[: tokenizer.vocab_size].argmax()
        ids.append(token)
    assert len(out) == 20 or padded_logits(model, ids)[: tokenizer.vocab_size].argmax() == tokenizer.end_id


def test_prefill_in_chunks_equals_whole(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = loaded
    rows = [beginning(tokenizer, PROMPT[:length]) for length in (0, 7, 8, 9, len(PROMPT))]
    monkeypatch.setattr(generation, "PREFILL_CHUNK", 8)
    logits, state = Sampler(model.bind, tokenizer.vocab_size, GREEDY).prefill(model.params, rows, length=40)
    np.testing.assert_array_equal(state["position"], [len(row) for row in rows])
    for found, row in zip(logits, rows, strict=True):
        np.testing.assert_allclose(found, padded_logits(model, row.tolist()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=20)], ids=str)
def test_rows_of_one_batch_are_drawn_as_if_alone(loaded: Any, sampling: Sampling) -> None:
    model, tokenizer, _ = loaded
    prompts = [b"", b"the cat", PROMPT]
    sampler = Sampler(model.bind, tokenizer.vocab_size, sampling)
    keys = np.stack([jax.random.key_data(jax.random.key(seed)) for seed in range(3)])
    rows = [beginning(tokenizer, prompt) for prompt in prompts]
    together = np.stack(list(sampler(model.params, rows, keys, 9)), axis=1)
    for seed, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        alone = list(generate(model, tokenizer, prompt, max_new_tokens=9, sampling=sampling, seed=seed))
        assert found[: len(alone)].tolist() == alone
        assert len(alone) == 9 or found[len(alone)] == tokenizer.end_id


def test_memory_does_not_grow_with_the_text(tiny_config: Config, loaded: Any) -> None:
    model, _, _ = loaded
    short, long = (jax.eval_shape(lambda n=n: model.init_state(1, n)) for n in (64, 4096))
    names = ("RGLRU", "local", "full")
    for i, name in enumerate(names):
        few, many = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state["stack"]["repeats"][i]))
            for state in (short, long)
        )
        assert (few < many) == (name == "full")


class Scripted:
    """A model whose logits always favour the next token of a script, whatever it reads."""

    def __init__(self, script: list[int], size: int):
        self.params = {"logits": jax.nn.one_hot(jnp.array(script), size) * 50.0}

    def bind(self, params: Any) -> Any:
        return ScriptedLM(params["logits"])


class ScriptedLM:
    def __init__(self, logits: jax.Array):
        self.logits = logits

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None, state: Any) -> Any:
        logits = jax.lax.dynamic_slice_in_dim(self.logits, state["place"], 1)[None]
        return jnp.broadcast_to(logits, (*tokens.shape, self.logits.shape[1])), {"place": state["place"] + 1}

    def init_state(self, batch: int, length: int) -> Any:
        return {"place": jnp.zeros((), jnp.int32)}


@pytest.fixture
def scripted() -> Callable[[list[int], int], list[int]]:
    def run(script: list[int], max_new_tokens: int) -> list[int]:
        # Unwrapped: the stand-in is no Model, which the run-time type check would refuse.
        return list(
            generate.__wrapped__(
                Scripted(script, 264), ByteTokenizer(), b"x", max_new_tokens=max_new_tokens, sampling=GREEDY
            )
        )

    return run


def test_the_end_of_the_document_stops_it(scripted: Callable[[list[int], int], list[int]]) -> None:
    assert scripted([5, 6, 256, 7], 10) == [5, 6]
    assert scripted([5, 6, 7, 8], 3) == [5, 6, 7]
    assert scripted([5, 6, 7, 8], 1) == [5]


def test_ids_beyond_the_tokenizer_are_never_drawn(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    hot = Sampling(temperature=1e6)  # all but uniform
    out = list(generate(model, tokenizer, PROMPT, max_new_tokens=30, sampling=hot, seed=1))
    assert max(out) < tokenizer.vocab_size


def test_the_same_seed_gives_the_same_text(loaded: Any) -> None:
    model, tokenizer, _ = loaded

    def text(seed: int) -> list[int]:
        return list(generate(model, tokenizer, PROMPT, max_new_tokens=12, sampling=Sampling(), seed=seed))

    first = text(3)
    assert text(3) == first
    assert any(text(seed) != first for seed in (4, 5))


def expected_distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What `sampling` says, in float64: temperature, then the k best, then the fewest best that reach top_p."""
    y = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-y)
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    p = np.exp(y[order] - y[order].max())
    p /= p.sum()
    if sampling.top_p is not None:
        kept = int(np.searchsorted(np.cumsum(p), sampling.top_p)) + 1
        order, p = order[:kept], p[:kept] / p[:kept].sum()
    full = np.zeros(len(y))
    full[order] = p
    return full


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0),
        Sampling(top_k=3),
        Sampling(top_k=1),
        Sampling(top_k=1000),
        Sampling(top_p=0.7),
        Sampling(top_p=0.01),
        Sampling(top_p=1.0),
        Sampling(temperature=1.5, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = np.random.default_rng(5).normal(size=11).astype(np.float32) * 1.5
    draws = 40_000
    drawn = jax.jit(lambda y, key: sample(y, key, sampling))(jnp.tile(logits, (draws, 1)), jax.random.key(0))
    counts = np.bincount(np.asarray(drawn), minlength=11)
    expected = draws * expected_distribution(logits, sampling)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    # Pearson's statistic; with at most 10 degrees of freedom 35 is passed once in 10,000 seeds.
    assert np.sum((counts[possible] - expected[possible]) ** 2 / expected[possible]) < 35
    assert np.all(counts[possible & (expected > 30)] > 0)


def test_each_row_is_drawn_by_its_own_logits() -> None:
    logits = jnp.eye(5)[jnp.array([3, 1, 4])] * 100
    for sampling in (GREEDY, Sampling(top_k=2, top_p=0.9)):
        np.testing.assert_array_equal(sample(logits, jax.random.key(0), sampling), [3, 1, 4])


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.5), ("temperature", float("nan")), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)],
)
def test_bad_sampling_values_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^--{field.replace('_', '-')}={value}: must be "):
        Sampling(**{field: value})
