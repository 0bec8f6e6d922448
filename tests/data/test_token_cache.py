"""Cached streams equal fresh ones, and neither damage nor an unwritable cache stops a run."""

import logging
from pathlib import Path

import numpy as np
import pytest

from hybridlm.data import token_cache
from hybridlm.data.packing import TokenStream, tokenize
from hybridlm.data.sources import Document
from hybridlm.data.token_cache import cache_root, cached_tokenize
from hybridlm.data.tokenizers import ByteTokenizer, load_tokenizer

DOCUMENTS = [Document("a", b"the quick brown fox"), Document("b", "naïve 日本 text".encode())]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def assert_equal(a: TokenStream, b: TokenStream) -> None:
    for name in token_cache.ARRAYS:
        assert np.array_equal(getattr(a, name), getattr(b, name)) and getattr(a, name).dtype == getattr(b, name).dtype
    assert a.end_id == b.end_id


def test_the_second_time_reads_what_the_first_wrote(subword_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    fresh = cached_tokenize(DOCUMENTS, tokenizer)
    monkeypatch.setattr(token_cache, "tokenize", None)
    assert_equal(cached_tokenize(DOCUMENTS, tokenizer), fresh)
    assert_equal(tokenize(DOCUMENTS, tokenizer), fresh)


def test_other_text_or_other_document_borders_are_other_streams(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    for documents in (DOCUMENTS, DOCUMENTS[:1], [Document("a", b"".join(d.text for d in DOCUMENTS))]):
        assert_equal(cached_tokenize(documents, tokenizer), tokenize(documents, tokenizer))
    assert len(list(cache_root().iterdir())) == 3


def test_bytes_leave_nothing_on_disk() -> None:
    cached_tokenize(DOCUMENTS, ByteTokenizer())
    assert not cache_root().exists()


def test_a_damaged_stream_is_made_again(bpe_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    cached_tokenize(DOCUMENTS, tokenizer)
    (array,) = cache_root().glob("*/tokens.npy")
    array.write_bytes(array.read_bytes()[:-5])
    with caplog.at_level(logging.WARNING):
        assert_equal(cached_tokenize(DOCUMENTS, tokenizer), tokenize(DOCUMENTS, tokenizer))
    assert "is damaged" in caplog.text
    (array,) = cache_root().glob("*/tokens.npy")
    assert np.load(array).size


def test_an_unwritable_cache_only_warns(bpe_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the directory should be")
    tokenizer = load_tokenizer(str(bpe_file))
    with caplog.at_level(logging.WARNING):
        assert_equal(cached_tokenize(DOCUMENTS, tokenizer), tokenize(DOCUMENTS, tokenizer))
    assert "is not kept for the next run" in caplog.text
