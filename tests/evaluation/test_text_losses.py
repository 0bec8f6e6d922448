"""Losses of documents in all windows against a float64 loop; tables and intervals against direct computation."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from hybridlm.config import Config, Data
from hybridlm.data.tokenizers import ByteTokenizer
from hybridlm.evaluation.document_scores import score_documents
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.perplexity import evaluate_run
from hybridlm.evaluation.scoring import Scorer, open_run
from hybridlm.evaluation.text_losses import text_losses
from hybridlm.evaluation.texts import Text, data_from_spec, read_texts, sentences
from hybridlm.evaluation.windows import Mode
from hybridlm.model import build
from tests.corpora import write_tfds
from tests.evaluation.oracle import Oracle

DOCUMENTS = ["the cat sat. é a dog ran, and one bird sang. the", "a dog", "one bird sang. " * 3]
WINDOW, STRIDE = 16, 5


@pytest.fixture(scope="module")
def oracle(run: Path) -> Oracle:
    return Oracle(run)


@pytest.fixture(scope="module")
def narrow(run: Path, tiny_config: Config) -> Scorer:
    """Windows of 16 tokens."""
    return open_run(replace(tiny_config, data=replace(tiny_config.data, seq_len=WINDOW)), run, 32)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    kinds = ["long", "short", "long"]
    rows = [{"text": text, "kind": kind} for text, kind in zip(DOCUMENTS, kinds, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def plain_loop(oracle: Oracle, text: str, mode: Mode) -> np.ndarray:
    """Nats of every token of a document and of its end."""
    tokens = [oracle.tokenizer.end_id, *text.encode(), oracle.tokenizer.end_id]
    nats = np.full(len(tokens), np.nan)
    if mode == "sliding":
        before = 0
        for begin in range(0, len(tokens), STRIDE):
            end = min(begin + WINDOW, len(tokens))
            found = oracle.nats(tokens[begin : end - 1], tokens[begin + 1 : end])
            for token in range(max(before, begin + 1), end):
                nats[token] = found[token - begin - 1]
            before = end
            if end == len(tokens):
                break
        return nats[1:]
    size = WINDOW if mode == "separate" else len(tokens)
    for begin in range(0, len(tokens) - 1, size):
        end = min(begin + size, len(tokens) - 1)
        nats[begin + 1 : end + 1] = oracle.nats(tokens[begin:end], tokens[begin + 1 : end + 1])
    return nats[1:]


@pytest.mark.parametrize("mode", ["separate", "sliding", "carried"])
def test_losses_are_those_of_a_float64_loop(narrow: Scorer, oracle: Oracle, lines: Path, mode: Mode) -> None:
    stride = STRIDE if mode == "sliding" else None
    report = text_losses(narrow, Options(data=str(lines), windows=mode, stride=stride, domain_field="kind"))
    texts = read_texts(data_from_spec(narrow.cfg.data, str(lines)), narrow.tokenizer, whole=True)
    scores = score_documents(narrow, texts, mode, stride)
    expected = [plain_loop(oracle, text, mode) for text in DOCUMENTS]
    for score, nats in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.nats, nats, rtol=1e-4)
    total, count = sum(nats.sum() for nats in expected), sum(map(len, expected))
    num_bytes, words = sum(len(text.encode()) for text in DOCUMENTS), sum(len(text.split()) for text in DOCUMENTS)
    assert (report["tokens"], report["bytes"], report["words"], report["documents"]) == (count, num_bytes, words, 3)
    assert report["loss"] == pytest.approx(total / count, rel=1e-5)
    assert report["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert report["bits_per_word"] == pytest.approx(total / math.log(2) / words, rel=1e-5)
    of_domain = {row["domain"]: row["loss"] for row in report["by_domain"]}
    assert of_domain["short"] == pytest.approx(expected[1].mean(), rel=1e-5)
    assert of_domain["long"] == pytest.approx(np.concatenate([expected[0], expected[2]]).mean(), rel=1e-5)


def test_positions_are_those_of_windows_or_of_documents(scorer: Scorer) -> None:
    texts = [text_of(40), text_of(9)]
    sliding, carried, packed = (
        score_documents(scorer, texts, mode, stride)
        for mode, stride in (("sliding", 8), ("carried", None), ("packed", None))
    )
    # Windows of 32 tokens begin at 0, 8 and 16; the first counts 31 targets, the others 8 and 1.
    assert sliding[0].position.tolist() == [*range(31), *range(23, 31), 23]
    assert carried[0].position.tolist() == list(range(40))
    assert packed[1].position.tolist() == list(range(8, 17))
    assert packed[0].begin.tolist() == [0] * 32 + [32] * 8
    assert not carried[0].begin.any()


def test_what_carried_windows_keep_is_as_large_for_any_length(tiny_config: Config) -> None:
    """Without full attention, which is the pattern's third block."""
    model = replace(tiny_config.model, num_layers=2, pattern=tiny_config.model.pattern[:2])
    init, bind = build(model, tiny_config.kernels)
    params = jax.eval_shape(lambda: init(jax.random.key(0)))

    def kept(length: int) -> list[tuple[int, ...]]:
        state = jax.eval_shape(lambda params: bind(params).init_state(1, length), params)
        return [x.shape for x in jax.tree.leaves(state)]

    assert kept(2**20) == kept(WINDOW)


def text_of(length: int) -> Text:
    """A document of so many targets."""
    return Text("a", "a", np.arange(length + 1, dtype=np.int32) % 7 + 97, length, 1)


def test_packed_windows_give_what_plain_eval_gives(run: Path, tiny_config: Config, scorer: Scorer) -> None:
    plain, report = evaluate_run(tiny_config, run, data_spec=None), text_losses(scorer, Options(by_file=True))
    for name in ("tokens", "bytes"):
        assert report[name] == plain[name]
    assert report["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    for ours, theirs in zip(report["by_position"], plain["by_position"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert len(report["by_domain"]) == report["documents"] > 1
    assert sum(row["tokens"] for row in report["by_domain"]) == report["tokens"]


def test_prepared_shards_hold_the_same_texts(invoke: Callable, lines: Path, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "shards", "--workers", 1, "--validation-fraction", 0.5)
    assert invoke("prepare", lines, *words).code == 0
    tokenizer = ByteTokenizer()
    prepared, given = (
        read_texts(data_from_spec(Data(), str(spec)), tokenizer, whole=True) for spec in (tmp_path / "shards", lines)
    )

    def held(texts: list[Text]) -> list[tuple[bytes, int, int]]:
        return sorted((text.tokens.tobytes(), text.num_bytes, text.num_words) for text in texts)

    assert held(prepared) == held(given)
    assert {text.domain for text in prepared} <= {"train", "validation"}
    assert {text.domain for text in given} == {"documents.jsonl"}


def test_sentences_lose_nothing() -> None:
    text = b"One. Two!  Three\nfour... five?\n\nsix"
    assert list(sentences([text])) == [b"One. ", b"Two!  ", b"Three\n", b"four... ", b"five?\n\n", b"six"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--domain-field", "knd"), ("--domain-field=knd: no such field at", "documents.jsonl:1; did you mean kind?")),
        (("--windows", "slidng"), ("--windows=slidng: must be one of packed, sliding",)),
        (("--windows", "sliding", "--stride", "40"), ("--stride=40: must be at least 1 and below --context=32",)),
        (("--windows", "carried", "--context", "64"), ("no document is longer than the window of 64 tokens",)),
        (("--bootstrap", "0"), ("--bootstrap=0: must be at least 1",)),
        (("--by-file", "--domain-field", "kind"), ("--by-file: or --domain-field, but not both",)),
        (("--depth", "0.5"), ("--depth: does nothing for perplexity; leave it out",)),
    ],
)
def test_wrong_words(invoke: Callable, run: Path, lines: Path, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    invoke("eval", run, "--data", lines, *words).assert_refused(*parts)


@pytest.mark.parametrize("windows", [(), ("--windows", "carried")], ids=["packed", "carried"])
def test_datasets_and_parquet_are_read_as_json_lines_are(
    invoke: Callable, run: Path, lines: Path, tmp_path: Path, windows: tuple[str, ...]
) -> None:
    pytest.importorskip("tensorflow_datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"text": DOCUMENTS})
    parquet.write_table(table, tmp_path / "texts.parquet")
    tfds = (write_tfds(tmp_path / "tfds", {"test": DOCUMENTS}), "--split=test", f"--tfds-dir={tmp_path / 'tfds'}")
    reports = []
    for words in ((lines,), (tmp_path / "texts.parquet",), tfds):
        result = invoke("eval", run, *windows, "--json", tmp_path / "report.json", "--data", *words)
        assert result.code == 0, result.err
        reports.append(json.loads((tmp_path / "report.json").read_text()))
        last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
        assert last["data"] == str(words[0])
    assert windows or "from hybridlm_test_text:1.0.0: 3 documents" in result.out
    for report in reports[1:]:
        assert (report["loss"], report["tokens"], report["bytes"]) == (
            reports[0]["loss"],
            reports[0]["tokens"],
            reports[0]["bytes"],
        )


def test_options_of_datasets_are_theirs(invoke: Callable, run: Path, lines: Path, tmp_path: Path) -> None:
    invoke("eval", run, "--data", lines, "--split=test").assert_refused("--split test: is about --data tfds:NAME")
    invoke("eval", run, "--data", "tfds:lm1b").assert_refused("--split: is required by tfds:lm1b")
    absent = tmp_path / "absent.parquet"
    invoke("eval", run, "--data", absent).assert_refused("absent.parquet", "No such file or directory")


def test_strides_are_refused_before_a_checkpoint_is_read(invoke: Callable, run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    words = ("--windows", "sliding", "--stride")
    invoke("eval", tmp_path, *words, 0).assert_refused("--stride=0: must be at least 1 and below --context=32")
    invoke("eval", tmp_path, *words, 8).assert_refused("holds no complete checkpoint; train first")


def test_the_command_prints_tables_and_keeps_numbers(invoke: Callable, run: Path, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    words = ("--windows", "sliding", "--stride", 8, "--bootstrap", 20, "--domain-field", "kind", "--json", out)
    code, printed, _ = invoke("eval", run, "--data", lines, *words)
    assert code == 0
    assert "windows          sliding of 32 tokens, stride 8" in printed
    assert "domain  documents      tokens    loss  bits per byte\nlong            2 " in printed
    report = json.loads(out.read_text())
    assert report["loss_low"] <= report["loss"] <= report["loss_high"]
    kept = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert kept == {name: value for name, value in report.items() if not isinstance(value, list)}
    assert (kept["task"], kept["step"], kept["stride"], kept["data"]) == ("perplexity", 12, 8, str(lines))
