"""What is hidden lies where it should; recall against a quadratic loop; states against those of single calls."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from hybridlm.cli.evaluate import keep
from hybridlm.data.packing import TokenStream
from hybridlm.data.tokenizers import ByteTokenizer
from hybridlm.evaluation.collapse import collapse, has_risen, lines_of
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.passkey import NEEDLE, NOISE, PASSKEY, needle, passkey, prompt
from hybridlm.evaluation.recall import counts_in, ngram_codes, recall, repeats
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.tasks import TASKS

TOKENIZER = ByteTokenizer()
FILLER = [TOKENIZER.encode(sentence).astype(np.int32) for sentence in NOISE]


def text_of(length: int, depth: float, *, twice: bool = False, seed: int = 0) -> tuple[str, str]:
    made = prompt(TOKENIZER, PASSKEY, FILLER, length=length, depth=depth, rng=np.random.default_rng(seed), twice=twice)
    assert made.context[0] == TOKENIZER.end_id
    assert len(made.context) + len(made.continuation) == length - (twice and length % 2 == 0)
    return TOKENIZER.decode(made.context[1:]), TOKENIZER.decode(made.continuation)


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_key_lies_at_its_depth(depth: float) -> None:
    context, answer = text_of(600, depth)
    hidden, question = f"The pass key is{answer}. Remember it.{answer} is the pass key. ", PASSKEY.question
    assert context.count(hidden) == 1
    assert context.endswith(question)
    straw = len(context) - len(hidden) - len(question)
    assert context.index(hidden) == pytest.approx(depth * straw, abs=max(map(len, NOISE)))
    assert len(answer) == 1 + PASSKEY.digits
    assert answer[1:].isdigit()


def test_prompts_depend_on_the_seed_alone() -> None:
    assert text_of(300, 0.5) == text_of(300, 0.5)
    assert text_of(300, 0.5)[1] != text_of(300, 0.5, seed=1)[1]


def test_read_twice_is_the_same_text_again() -> None:
    context, _ = text_of(401, 0.5, twice=True)
    half = len(context) // 2
    assert context[:half] == context[half:]


def test_grids_of_lengths_and_depths(scorer: Scorer) -> None:
    options = Options(length=(150, 200), depth=(0.0, 1.0), samples=2)
    report = passkey(scorer, options)
    assert [(cell["length"], cell["depth"]) for cell in report["cells"]] == [
        (150, 0.0),
        (150, 1.0),
        (200, 0.0),
        (200, 1.0),
    ]
    assert report["acc"] == pytest.approx(np.mean([cell["acc"] for cell in report["cells"]]))
    assert report["chance_bits"] == pytest.approx(np.log2(90_000))
    assert report == passkey(scorer, options)
    other = needle(scorer, Options(length=(250,), depth=(0.5,), samples=1))
    assert other["chance_bits"] == pytest.approx(np.log2(9 * 10 ** (NEEDLE.digits - 1)))


@pytest.mark.parametrize("size", [2, 3])
def test_repeats_are_found_within_what_was_seen(size: int, rng: np.random.Generator) -> None:
    tokens = rng.integers(4, size=60).astype(np.int32)
    begin = np.repeat([0, 20, 40], [20, 20, 19])
    hits = repeats(ngram_codes(tokens, size), begin, size)
    for target in range(59):
        last = target + 1 - size + 1
        seen = [tuple(tokens[i : i + size]) for i in range(begin[target], last)]
        assert hits[target] == (last >= 0 and tuple(tokens[last : last + size]) in seen)
    assert 0 < hits.sum() < 59


def test_counts_go_over_the_ends_of_chunks(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridlm.evaluation.recall.READ_TOKENS", 7)
    tokens = rng.integers(3, size=50).astype(np.uint16)
    stream = TokenStream(tokens, np.ones(50, np.uint8), np.array([0]), 0)
    wanted, counts = np.unique(ngram_codes(tokens, 3), return_counts=True)
    assert counts_in([stream], wanted, 3).tolist() == counts.tolist()


def test_recall_splits_all_tokens(scorer: Scorer) -> None:
    report = recall(scorer, Options(windows="separate", ngram=3))
    assert report["recall_share"] + report["other_share"] == pytest.approx(1)
    mean = report["recall_share"] * report["recall_loss"] + report["other_share"] * report["other_loss"]
    assert report["loss"] == pytest.approx(mean, rel=1e-6)
    rare = recall(scorer, Options(windows="separate", ngram=3, rare=20))
    assert rare["recall_tokens"] + rare["common_tokens"] == report["recall_tokens"]
    assert rare["other_tokens"] == report["other_tokens"]
    assert 0 < rare["common_tokens"]


def test_states_are_those_of_one_row_read_at_once(scorer: Scorer, run: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_bytes(b"the cat sat. one bird sang. a dog ran. " * 30)
    report = collapse(scorer, Options(data=str(text), length=(96,)))
    assert [window["end"] for window in report["by_window"]] == [32, 64, 96]
    model, tokenizer, _ = hybridlm.load(run)
    stream = np.array([tokenizer.end_id, *text.read_bytes(), tokenizer.end_id], np.int32)
    norms, losses = [], []
    for row in range(report["rows"]):
        part = stream[row * 96 : (row + 1) * 96 + 1]
        y, state = model(jnp.asarray(part[None, :-1]), None, model.init_state(1, 96))
        assert state is not None
        y = np.asarray(y, np.float64)[0, 64:]
        losses.append(np.mean(np.log(np.exp(y).sum(-1)) - y[np.arange(32), part[65:]]))
        norms.append(np.linalg.norm(jax.device_get(state["stack"]["repeats"][0]["h"])))
    [layer] = report["by_window"][-1]["layers"]  # the others have attention
    assert layer["layer"] == 0
    assert layer["norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert report["loss_at_end"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert lines_of(report)[1].split()[0] == "32"
    assert [row["length"] for row in report["by_length"]] == [32, 64, 96]
    assert report["by_length"][-1] == {"length": 96, "loss": report["loss_at_end"], "layer 0": layer["norm"]}
    keep(tmp_path, report, TASKS["collapse"].charted)
    kept = json.loads((tmp_path / "eval.jsonl").read_text())
    assert kept["by_length"] == report["by_length"] and "by_window" not in kept


def test_a_rise_must_be_sure_and_large() -> None:
    before = np.array([1.0, 1.2, 0.9, 1.1])
    assert has_risen(before, before + 0.1)
    assert not has_risen(before, before + 0.01)
    assert not has_risen(before, before + np.array([0.9, -0.5, 0.8, -0.6]))
    assert not has_risen(before, before - 0.5)
