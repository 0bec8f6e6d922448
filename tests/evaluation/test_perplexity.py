"""`hybridlm eval` against a float64 computation over whole logits, and its baselines against direct ones."""

import gzip
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from hybridlm import cli
from hybridlm.config import Config
from hybridlm.data.corpus import load_corpus
from hybridlm.data.sources import read_documents, split_documents
from hybridlm.evaluation.perplexity import baselines, evaluate_run, table
from hybridlm.losses import Head
from hybridlm.train.held_out import evaluate, make_eval_step, position_buckets

TEXT = "the cat sat. a dog ran. é one bird sang. the dog sat. " * 3


def float64_scores(run: Path, documents: list[bytes], length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Nats and counts by position in the window, and bytes: windows of the concatenated documents, one at a time."""
    model, tokenizer, _ = hybridlm.load(run)
    stream, ids = [], []
    for number, text in enumerate(documents, 1):
        stream += [tokenizer.end_id, *text]
        ids += [number] * (1 + len(text))
    stream.append(tokenizer.end_id)
    nats, counts = np.zeros(length), np.zeros(length)
    for first in range(0, len(ids), length):
        tokens, segments = np.full((1, length), tokenizer.end_id), np.zeros((1, length), np.int32)
        real = min(length, len(ids) - first)
        tokens[0, :real], segments[0, :real] = stream[first : first + real], ids[first : first + real]
        y, _ = model(jnp.asarray(tokens, jnp.int32), jnp.asarray(segments))
        y = np.asarray(y, np.float64)
        for t in range(real):
            nats[t] += np.log(np.exp(y[0, t]).sum()) - y[0, t, stream[first + t + 1]]
            counts[t] += 1
    return nats, counts, sum(map(len, documents))


def assert_equals(report: dict[str, Any], nats: np.ndarray, counts: np.ndarray, num_bytes: int) -> None:
    loss = nats.sum() / counts.sum()
    assert report["tokens"] == counts.sum()
    assert report["bytes"] == num_bytes
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert report["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / num_bytes, rel=1e-5)
    first = 0
    for begin, end, mean in report["by_position"]:
        assert begin == first
        assert mean == pytest.approx(nats[begin:end].sum() / counts[begin:end].sum(), rel=1e-5)
        first = end
    assert first == len(nats)


def test_held_out_text_of_the_run(trained_run: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate_run(tiny_config, trained_run, data_spec=None)
    _, held_out = split_documents(read_documents(tiny_config.data), tiny_config.data.validation_fraction)
    assert len(held_out) > 1
    assert_equals(report, *float64_scores(trained_run, [document.text for document in held_out], 32))
    assert report["step"] == 12
    text = load_corpus(tiny_config.data).validation_bytes()
    assert report["bytes"] == len(text)
    assert report["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, 9)) / len(text)
    out = capsys.readouterr().out
    assert f"bits per byte    {report['bits_per_byte']:.4f}\n  gzip -9        {report['gzip_bits_per_byte']:.4f}" in out
    assert "loss by position 0-15: " in out


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_other_text_in_another_window_by_command(run: Path, tmp_path: Path, kind: str) -> None:
    if kind == "text":
        source, documents = tmp_path / "other.txt", [TEXT.encode()]
        source.write_bytes(documents[0])
    else:
        source, documents = tmp_path / "other.jsonl", [TEXT[:70].encode(), TEXT[70:].encode()]
        source.write_text("".join(json.dumps({"text": d.decode()}) + "\n" for d in documents))
    out = tmp_path / "report.json"
    words = ["eval", str(run), "--data", str(source), "--context", "48", "--json", str(out)]
    assert cli.run(words) == 0
    assert_equals(json.loads(out.read_text()), *float64_scores(run, documents, 48))


def test_rows_of_padding_do_not_count(trained_run: Path, tiny_config: Config, tmp_path: Path) -> None:
    source = tmp_path / "short.txt"
    source.write_bytes(b"a dog")
    report = evaluate_run(tiny_config, trained_run, data_spec=str(source))
    assert report["tokens"] == 6  # five bytes, and the end of the document
    assert report["bytes"] == 5
    nats, counts, num_bytes = float64_scores(trained_run, [b"a dog"], 32)
    assert report["loss"] == pytest.approx(nats.sum() / counts.sum(), rel=1e-5)
    assert [tuple(bucket[:2]) for bucket in report["by_position"]] == [(0, 16)]


def test_any_batch_size_gives_the_same_numbers(trained_run: Path, tiny_config: Config) -> None:
    larger = replace(tiny_config, train=replace(tiny_config.train, batch_size=16))
    one, other = (evaluate_run(c, trained_run, data_spec=None) for c in (tiny_config, larger))
    assert other["tokens"] == one["tokens"]
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)


def test_position_buckets_double_and_leave_out_what_is_empty() -> None:
    nats, tokens = np.arange(70.0), np.ones(70)
    tokens[32:64] = 0
    buckets = position_buckets(nats * tokens, tokens)
    assert buckets == [(0, 16, 7.5), (16, 32, 23.5), (64, 70, 66.5)]


def test_choices_that_find_no_place_are_averaged_over_layers_and_batches() -> None:
    def bind(by_layer: Any) -> Any:
        """A model of one word, two of whose layers drop so much times the first token."""

        def features(tokens: Any, segments: Any, step: Any) -> Any:
            return jnp.zeros((*tokens.shape, 1)), {}, {name: x * tokens[0, 0] for name, x in by_layer.items()}

        return SimpleNamespace(features=features, head=lambda: Head(jnp.ones((1, 1)), tied=True))

    ones = jnp.ones((2, 3), jnp.int32)
    names = ("targets", "segment_ids", "positions", "loss_weight", "target_bytes")
    batches = [{name: ones for name in names} | {"tokens": first * ones} for first in (1, 4)]
    run = make_eval_step(bind)
    report = evaluate(run, {"moe_dropped": jnp.array([0.0, 0.25])}, batches)
    assert report["moe_dropped"] == (0.125 + 4 * 0.125) / 2
    assert "moe_dropped" not in evaluate(run, {}, batches)
    report |= {"step": 3} | baselines(b"ab")
    assert table(report).endswith("\ndropped          31.25% of the choices of experts; raise buffer_factor")
    assert "dropped" not in table(report | {"moe_dropped": 0.0})


def test_baselines() -> None:
    text = bytes(np.random.default_rng(0).choice([7, 8, 200, 255], size=999, p=[0.5, 0.25, 0.2, 0.05]).astype(np.uint8))
    entropy = -sum(n / 999 * math.log2(n / 999) for n in Counter(text).values())
    result = baselines(text)
    assert result["order0_bits_per_byte"] == pytest.approx(entropy, rel=1e-12)
    assert result["gzip_bits_per_byte"] == 8 * len(gzip.compress(text, compresslevel=9)) / 999
    assert baselines(b"aaaa")["order0_bits_per_byte"] == 0
