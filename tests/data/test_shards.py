"""Prepared shards: what is read is what was written, wherever it lies; what is damaged is named, never returned."""

import copy
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridlm.config_check import ConfigError
from hybridlm.data import shards
from hybridlm.data.manifest import Manifest, Shard, TokenizerIdentity, checksum
from hybridlm.data.shards import DamagedShard, PreparedStream, ShardWriter, decode_record, encode_record
from hybridlm.data.tokenizers import ByteTokenizer

END = 9
RECORD = 7
LENGTHS = [[5, 1, 0, 13, 30], [3], [14, 6, 27, 2, 8, 8, 8]]
"""Tokens of each document of each shard: some fill records exactly, one spans several, one is empty."""

Documents = list[list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def documents() -> Documents:
    """Ids and bytes per token of each document; one token stands for 300 bytes, one for 70,000."""
    rng = np.random.default_rng(0)
    made = [[(rng.integers(0, 9, n), rng.integers(1, 20, n)) for n in lengths] for lengths in LENGTHS]
    made[0][3][1][4] = 300
    made[2][0][1][0] = 70_000
    return made


@pytest.fixture(scope="module")
def written(documents: Documents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("prepared"), documents, vocab_size=10)


@pytest.fixture
def prepared(written: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return shutil.copytree(written, tmp_path / "prepared")


def write(directory: Path, documents: Documents, *, vocab_size: int) -> Path:
    described = []
    for part, contents in enumerate(documents):
        path = directory / f"train-{part:05d}.array_record"
        writer = ShardWriter(path, record_tokens=RECORD, end_id=END, vocab_size=vocab_size)
        for ids, lengths in contents:
            writer.add(ids, lengths, int(lengths.sum()))
        writer.close()
        described.append(
            Shard(
                name=path.name,
                split="train",
                part=part,
                num_bytes=path.stat().st_size,
                blake2b=checksum(path),
                num_tokens=writer.num_tokens,
                num_documents=writer.num_documents,
                text_bytes=writer.text_bytes,
            )
        )
    tokenizer = TokenizerIdentity("t", "f", "1", vocab_size, END)
    plan = {"source": {"kind": "text", "path": "texts"}, "decides": {}}
    Manifest(tokenizer, RECORD, plan, tuple(reversed(described))).write(directory)
    return directory


def stream_of(documents: Documents) -> tuple[list[int], list[int], list[int]]:
    """Token by token: ids, bytes, starts."""
    tokens: list[int] = []
    num_bytes: list[int] = []
    starts: list[int] = []
    for ids, lengths in (document for shard in documents for document in shard):
        starts.append(len(tokens))
        tokens += [END, *ids.tolist()]
        num_bytes += [0, *lengths.tolist()]
    return [*tokens, END], [*num_bytes, 0], starts


def test_every_range_of_the_stream_reads_as_it_was_written(written: Path, documents: Documents) -> None:
    stream = PreparedStream(written, "train")
    tokens, num_bytes, starts = stream_of(documents)
    assert stream.num_targets == len(tokens) - 1 and stream.end_id == END
    for begin in range(len(tokens) + 1):
        for end in range(begin, len(tokens) + 1):
            read = stream.read(begin, end)
            assert read[0].tolist() == tokens[begin:end]
            assert read[1].tolist() == num_bytes[begin:end]
            assert read[2].tolist() == [start - begin for start in starts if begin <= start < end]


def test_tokens_have_the_smallest_dtype_that_holds_the_vocabulary(documents: Documents, tmp_path: Path) -> None:
    for vocab_size, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        directory = tmp_path / str(vocab_size)
        directory.mkdir()
        stream = PreparedStream(write(directory, documents, vocab_size=vocab_size), "train")
        assert {stream.read(a, b)[0].dtype for a, b in ((0, 0), (3, 5), (0, 40), (5, stream.num_targets + 1))} == {
            np.dtype(dtype)
        }


def test_what_lies_outside_the_stream_is_refused(written: Path) -> None:
    stream = PreparedStream(written, "train")
    for begin, end in ((-1, 3), (3, 2), (0, stream.num_targets + 2)):
        with pytest.raises(IndexError):
            stream.read(begin, end)


def test_starts_of_all_documents_are_known_without_reading_tokens(written: Path, documents: Documents) -> None:
    assert PreparedStream(written, "train").document_starts().tolist() == stream_of(documents)[2]


def test_a_split_without_shards_has_nothing_to_predict(written: Path) -> None:
    stream = PreparedStream(written, "validation")
    assert stream.num_targets == 0
    assert stream.read(0, 1)[0].tolist() == [END]
    assert stream.document_starts().tolist() == []


def test_a_stream_pickles_without_its_files_and_opens_them_anew(written: Path) -> None:
    stream = PreparedStream(written, "train")
    before = stream.read(3, 60)
    assert len(pickle.dumps(stream)) < 4000
    again = copy.deepcopy(stream)  # by what pickle calls
    assert stream._readers and not again._readers
    np.testing.assert_array_equal(again.read(3, 60)[0], before[0])


def test_threads_read_the_same_and_few_files_stay_open(
    written: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 1)
    stream = PreparedStream(written, "train")
    tokens = stream_of(documents)[0]
    begins = rng.integers(0, len(tokens) - 20, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda begin: stream.read(begin, begin + 20)[0].tolist(), begins))
    assert read == [tokens[begin : begin + 20] for begin in begins]
    assert len(stream._readers) == 1


@given(st.data())
def test_a_record_is_decoded_to_what_was_encoded(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 20))
    dtype = data.draw(st.sampled_from([np.uint16, np.uint32]))
    tokens = np.array(data.draw(st.lists(st.integers(0, np.iinfo(dtype).max), min_size=length, max_size=length)), dtype)
    lengths = st.integers(0, data.draw(st.sampled_from([255, 2**16 - 1, 2**32 - 1])))
    num_bytes = np.array(data.draw(st.lists(lengths, min_size=length, max_size=length)), np.uint64)
    starts = np.array(sorted(data.draw(st.sets(st.integers(0, max(length - 1, 0))))), np.int64)
    record = encode_record(tokens, num_bytes, starts)
    for found, expected in zip(decode_record(record), (tokens, num_bytes, starts), strict=True):
        assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError):
        decode_record(record[: data.draw(st.integers(0, len(record) - 1))])


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        PreparedStream(directory, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(prepared: Path) -> None:
    (prepared / "train-00001.array_record").unlink()
    assert "train-00001.array_record is missing" in refusal(prepared)


@pytest.mark.parametrize("kept", [0, 1, 1000, -1])
def test_a_truncated_shard_is_named(prepared: Path, kept: int) -> None:
    path = prepared / "train-00002.array_record"
    contents = path.read_bytes()
    path.write_bytes(contents[:kept])
    message = refusal(prepared)
    assert f"train-00002.array_record has {len(contents[:kept]):,} bytes, not {len(contents):,}" in message


def test_a_shard_that_is_truncated_while_it_is_read_is_named(prepared: Path) -> None:
    stream = PreparedStream(prepared, "train")
    path = prepared / "train-00002.array_record"
    with path.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DamagedShard, match=r"train-00002.array_record: .* is damaged"):
        stream.read(0, stream.num_targets)


def test_no_flipped_bit_is_read_as_text(prepared: Path, documents: Documents, rng: np.random.Generator) -> None:
    tokens = stream_of(documents)[0]
    path = prepared / "train-00002.array_record"
    whole = path.read_bytes()
    # Most of a small file is padding: half of the flips are among what is not zero.
    used = np.flatnonzero(np.frombuffer(whole, np.uint8))
    num_named = 0
    for place in [*rng.choice(used, 40).tolist(), *rng.integers(0, len(whole), 20).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        stream = PreparedStream(prepared, "train")
        assert len(stream.verify()) == 1 and "train-00002.array_record has changed" in stream.verify()[0]
        try:
            assert stream.read(0, stream.num_targets + 1)[0].tolist() == tokens
        except DamagedShard as error:
            num_named += 1
            assert "train-00002.array_record: " in str(error) and "--verify" in str(error)
    assert num_named >= 20


def test_an_undamaged_split_verifies(written: Path) -> None:
    assert PreparedStream(written, "train").verify() == []


def test_shards_of_two_preparations_do_not_mix(prepared: Path, documents: Documents, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    longer = [*documents[:1], [(np.arange(5), np.ones(5, np.int64))], *documents[2:]]
    write(other, longer, vocab_size=10)
    shutil.copy(other / "train-00001.array_record", prepared)
    stream = PreparedStream(prepared, "train")
    with pytest.raises(DamagedShard, match=r"train-00001.array_record: record 0 is damaged \(6 tokens, not 4\)"):
        stream.read(0, stream.num_targets)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Path.unlink, "manifest.json: no such file"),
        (lambda path: path.write_text("{"), "manifest.json: is damaged"),
        (lambda path: path.write_text("[]"), "manifest.json: is damaged"),
        (lambda path: path.write_text('{"format": 1, "shards": []}'), "manifest.json: is damaged"),
        (
            lambda path: path.write_text(path.read_text().replace("train-00001", "../train-00001")),
            "manifest.json: is damaged (ValueError(\"a shard's name leads elsewhere",
        ),
        (lambda path: path.write_text('{"format": 77}'), "manifest.json: has format 77, not 1"),
    ],
)
def test_without_a_whole_manifest_there_is_no_data(
    prepared: Path, change: Callable[[Path], object], message: str
) -> None:
    change(prepared / "manifest.json")
    assert message in refusal(prepared)


def test_another_split_is_refused(written: Path) -> None:
    with pytest.raises(ConfigError, match="prepared data has train and validation"):
        PreparedStream(written, "test")


def test_another_tokenizer_is_refused_with_both_fingerprints(written: Path) -> None:
    manifest = Manifest.read(written)
    same = SimpleNamespace(name="elsewhere/t", fingerprint="f", version="2", vocab_size=10, end_id=END)
    manifest.check_tokenizer(same, written)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError) as caught:
        manifest.check_tokenizer(ByteTokenizer(), written)
    assert "data.tokenizer='byte' (fingerprint byte" in str(caught.value) and "fingerprint f," in str(caught.value)


def test_the_fingerprint_is_of_contents_and_tokenizer(written: Path) -> None:
    manifest = Manifest.read(written)
    same = PreparedStream(written, "train").fingerprint
    assert same == manifest.fingerprint("train") != manifest.fingerprint("validation")
    changed = replace(manifest.shards[0], blake2b="0" * 64)
    others = [
        replace(manifest, shards=(changed, *manifest.shards[1:])),
        replace(manifest, tokenizer=replace(manifest.tokenizer, fingerprint="g")),
    ]
    assert same not in [other.fingerprint("train") for other in others]
