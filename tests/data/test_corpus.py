"""Corpora from their configs: one source, mixtures of all kinds, prepared data, and errors that name the source."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlm import config
from hybridlm.config import Part, Stage
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import Corpus, load_corpus, load_whole
from hybridlm.data.pipeline import Batches

Write = Callable[[dict[str, bytes]], Path]
Invoke = Callable[..., Any]


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def three(write_files: Write, invoke: Invoke) -> config.Data:
    """A mixture of text files, JSON lines and prepared data."""
    lines = "".join(json.dumps({"body": f"line {i} " * (i + 1)}) + "\n" for i in range(9))
    files = {f"text/{i}.txt": f"text {i}. ".encode() * (7 * i + 3) for i in range(5)}
    code = {f"code/{i}.py": f"x = {i}\n".encode() * (5 * i + 1) for i in range(12)}
    root = write_files(files | code | {"lines.jsonl": lines.encode()})
    out = root / "prepared"
    made = invoke("prepare", root / "code", "--out", out, "--workers", 1, "--validation-fraction", 0.2)
    assert made.code == 0, made.err
    mixture = (
        Part(name="text", path=str(root / "text"), weight=2),
        Part(name="lines", source="jsonl", path=str(root / "lines.jsonl"), text_key="body"),
        Part(name="code", source="prepared", path=str(out), weight=3),
    )
    stages = (Stage(first_step=5, weights=("code=0", "text=1", "lines=1")),)
    return config.Data(mixture=mixture, stages=stages, seq_len=16, validation_fraction=0.2)


def alone(data: config.Data, part: Part) -> config.Data:
    return replace(data, source=part.source, path=part.path, text_key=part.text_key, mixture=(), stages=())


def train_windows(corpus: Corpus) -> list[list[int]]:
    [source] = corpus.train.sources
    return [source.windows[i]["tokens"].tolist() for i in range(len(source.windows))]


def validation_windows(corpus: Corpus) -> list[list[int]]:
    return [corpus.validation[i]["tokens"].tolist() for i in range(len(corpus.validation))]


def draw(data: config.Data, count: int) -> np.ndarray:
    batches = Batches(load_corpus(data).train, batch_size=6, seed=1, sharding=None, prefetch=2)
    rows = [np.asarray(next(batches)["tokens"]) for _ in range(count)]
    batches.close()
    return np.stack(rows)


def test_a_mixture_holds_the_sources_as_they_are_alone(three: config.Data) -> None:
    corpus = load_corpus(three)
    parts = [load_corpus(alone(three, part)) for part in three.mixture]
    assert [source.name for source in corpus.train.sources] == ["text", "lines", "code"]
    assert corpus.train.stages == ((0, (2, 1, 3)), (5, (1, 1, 0)))
    for source, part in zip(corpus.train.sources, parts, strict=True):
        assert [source.windows[i]["tokens"].tolist() for i in range(len(source.windows))] == train_windows(part)
    assert validation_windows(corpus) == [window for part in parts for window in validation_windows(part)]
    assert corpus.validation_bytes() == b"".join(part.validation_bytes() for part in parts)
    shares = (
        "mixture of text 0.3333 (text ",
        "lines 0.1667 (jsonl ",
        "code 0.5 (prepared ",
        "other weights from batch 5",
    )
    assert all(share in corpus.description for share in shares)


def test_batches_have_rows_of_the_sources_in_turn(three: config.Data) -> None:
    corpus = load_corpus(three)
    origin: dict[tuple[int, ...], str] = {}
    for source in corpus.train.sources:
        origin |= {tuple(source.windows[i]["tokens"].tolist()): source.name for i in range(len(source.windows))}
    rows = draw(three, 7)
    for batch, expected in [(0, [2, 1, 3]), (4, [2, 1, 3]), (5, [3, 3, 0]), (6, [3, 3, 0])]:
        names = [origin[tuple(row.tolist())] for row in rows[batch]]
        assert [names.count(name) for name in ("text", "lines", "code")] == expected


def test_prepared_data_gives_the_batches_of_the_text_it_was_made_of(three: config.Data) -> None:
    prepared = alone(three, three.mixture[2])
    assert prepared.path is not None
    text = replace(prepared, source="text", path=str(Path(prepared.path).parent / "code"))
    for packing in ("concatenate", "first-fit"):
        ours, theirs = replace(prepared, packing=packing), replace(text, packing=packing)
        assert np.array_equal(draw(ours, 20), draw(theirs, 20))
        assert load_corpus(ours).validation_bytes() == load_corpus(theirs).validation_bytes()


def test_all_of_it_can_be_held_out(three: config.Data) -> None:
    corpus, split = load_whole(three), load_corpus(three)
    in_windows = sum(int(corpus.validation[i]["target_bytes"].sum()) for i in range(len(corpus.validation)))
    sources = [source.windows for source in split.train.sources]
    to_train = sum(int(windows[i]["target_bytes"].sum()) for windows in sources for i in range(len(windows)))
    assert in_windows == len(corpus.validation_bytes()) == to_train + len(split.validation_bytes())
    assert corpus.train.sources == ()


def test_packing_is_described_and_leaves_held_out_text_as_it_is(three: config.Data) -> None:
    concatenated, packed = load_corpus(three), load_corpus(replace(three, packing="first-fit"))
    assert packed.fingerprint != concatenated.fingerprint
    assert validation_windows(packed) == validation_windows(concatenated)
    windows = [source.windows[i] for source in packed.train.sources for i in range(len(source.windows))]
    share = 1 - np.mean([window["loss_weight"] for window in windows])
    assert f"whole documents in sequences, of which {share:.2%} is padding" in packed.description


def test_errors_of_a_part_name_it(three: config.Data, bpe_file: Path) -> None:
    def refusal(data: config.Data) -> str:
        with pytest.raises(ConfigError) as caught:
            load_corpus(data)
        return str(caught.value)

    text, lines, code = three.mixture
    for i, part, expected in [
        (0, replace(text, path="no/such/path"), "data.mixture.0.path='no/such/path': "),
        (1, replace(lines, text_key="text"), "data.mixture.1.text_key='text': no such field"),
        (2, replace(code, path=text.path), "data.mixture.2.path="),
        (1, replace(lines, weight=1e-5), "data.mixture: lines has a share of "),
    ]:
        changed = tuple(part if k == i else old for k, old in enumerate(three.mixture))
        assert refusal(replace(three, mixture=changed)).startswith(expected)
    assert refusal(replace(three, seq_len=2000)).startswith("data.seq_len=2000: the training text of ")
    stages = (Stage(first_step=3, weights=("text=1e-6", "lines=1", "code=1")),)
    assert refusal(replace(three, stages=stages)).startswith("data.stages.0.weights: text has a share of ")
    other = refusal(replace(three, tokenizer=str(bpe_file)))
    assert other.startswith(f"data.tokenizer={str(bpe_file)!r}") and "was prepared with 'byte'" in other


def test_the_standard_library_is_split_by_file_and_described() -> None:
    corpus = load_corpus(config.Data(seq_len=512))
    [source] = corpus.train.sources
    assert corpus.description.startswith("python-stdlib: ") and "held out" in corpus.description
    assert source.windows.stream.num_targets > 5_000_000
    held_out = len(corpus.validation_bytes())
    assert held_out == sum(int(corpus.validation[i]["target_bytes"].sum()) for i in range(len(corpus.validation)))
    assert 0.002 < held_out / source.windows.stream.num_targets < 0.1


def test_the_fingerprint_tells_corpora_apart(write_files: Write, bpe_file: Path) -> None:
    root = write_files({"a.txt": b"some text " * 9, "b.txt": b"other text " * 9})
    data = dict(source="text", path=str(root), seq_len=8)
    original = load_corpus(config.Data(**data)).fingerprint
    assert load_corpus(config.Data(**data)).fingerprint == original
    others = [
        load_corpus(config.Data(**data | {"seq_len": 9})).fingerprint,
        load_corpus(config.Data(**data, tokenizer=str(bpe_file))).fingerprint,
    ]
    (root / "b.txt").write_bytes(b"other text!" * 9)
    others.append(load_corpus(config.Data(**data)).fingerprint)
    assert len({original, *others}) == 4


def test_a_training_text_shorter_than_a_sequence_names_the_longest_that_works(write_files: Write) -> None:
    root = write_files({"a.txt": b"x" * 40})
    with pytest.raises(ConfigError) as caught:
        load_corpus(config.Data(source="text", path=str(root), seq_len=64, validation_fraction=0.1))
    assert str(caught.value) == (
        "data.seq_len=64: the training text has only 37 tokens; seq_len may be at most 37, or add text"
    )
    corpus = load_corpus(config.Data(source="text", path=str(root), seq_len=37, validation_fraction=0.1))
    assert (len(corpus.train.sources[0].windows), len(corpus.validation), len(corpus.validation_bytes())) == (1, 1, 4)
