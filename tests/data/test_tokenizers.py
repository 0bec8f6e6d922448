"""Tokenizers: lossless bytes, exact byte counts, text while it is generated, clear errors."""

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import ByteTokenizer, StreamDecoder, load_tokenizer

TEXTS = [
    "def add(x):\n    return x\n",
    "  spaces first and last  \n\n",
    "日本語 and 🙂🙃 and ½ — “mixed”\u00a0text\n\tnaïve",
    "é",
    "<|endoftext|> and </s> are ordinary text here",
    "",
]


def test_bytes_round_trip_even_where_they_are_not_utf8() -> None:
    data = bytes(range(256)) + b"\xff\xfe\xe2\x82 bad \xf0\x9f\x99"
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode([0xE2, 0x82, 65, tokenizer.end_id, 300]) == "\ufffdA"


@pytest.mark.parametrize("text", TEXTS)
def test_byte_lengths_of_tokens_sum_to_the_text(subword_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    ids, lengths = tokenizer.encode_with_lengths(text.encode())
    assert lengths.sum() == len(text.encode())
    assert ids.tolist() == tokenizer.encode(text.encode()).tolist()
    assert len(ids) == len(lengths) and all(0 <= i < tokenizer.vocab_size for i in ids)


def test_byte_level_bpe_lengths_are_those_of_its_pieces(bpe_file: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_file))
    ids, lengths = load_tokenizer(str(bpe_file)).encode_with_lengths(b"def  add(x,  yy):\n\n    return the dog ")
    # A byte-level piece is written with one character per byte.
    assert lengths.tolist() == [len(inner.id_to_token(int(i))) for i in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_round_trips(bpe_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_never_encodes_to_the_end_of_a_document(subword_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    assert tokenizer.end_id not in tokenizer.encode(text.encode())


def test_ids_outside_the_vocabulary_decode_to_nothing(subword_file: Path) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    ids = tokenizer.encode(b"the dog").tolist()
    assert tokenizer.decode([*ids, tokenizer.end_id, tokenizer.vocab_size + 7]) == tokenizer.decode(ids) == "the dog"


def test_a_saved_truncation_does_not_cut_documents(bpe_file: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_file))
    inner.enable_truncation(3)
    inner.enable_padding(length=512)
    inner.save(str(tmp_path / "tokenizer.json"))
    text = b"the quick brown fox jumps"
    ids = load_tokenizer(str(tmp_path / "tokenizer.json")).encode(text)
    assert ids.tolist() == load_tokenizer(str(bpe_file)).encode(text).tolist()


def test_end_token_is_the_configured_one_then_a_known_one_then_a_new_one(bpe_file: Path, tmp_path: Path) -> None:
    description = json.loads(bpe_file.read_bytes())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description))
    known = load_tokenizer(str(path))
    assert known.end_id == description["model"]["vocab"]["<|endoftext|>"]

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    assert load_tokenizer(str(path)).end_id == description["model"]["vocab"]["!"]

    (tmp_path / "tokenizer_config.json").unlink()
    path.write_text(json.dumps(description).replace("<|endoftext|>", "<|other|>"))
    unknown = load_tokenizer(str(path))
    assert unknown.end_id == known.vocab_size and unknown.vocab_size == known.vocab_size + 1


@pytest.mark.parametrize("before", [None, "<|endoftext|>", "!"])
def test_documents_begin_with_what_the_post_processor_puts_before_text(
    bpe_file: Path, tmp_path: Path, before: str | None
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer.from_file(str(bpe_file))
    end_id = inner.token_to_id("<|endoftext|>")
    begin_id = end_id if before is None else inner.token_to_id(before)
    if before is not None:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{before} $A <|endoftext|>", special_tokens=[(before, begin_id), ("<|endoftext|>", end_id)]
        )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (tokenizer.begin_id, tokenizer.end_id) == (begin_id, end_id)
    assert tokenizer.encode(b"a").tolist() == [inner.token_to_id("a")]


@pytest.mark.parametrize("adds", [True, False])
def test_sentencepiece_begins_documents_with_its_bos_where_the_config_says_so(
    sentencepiece_file: Path, tmp_path: Path, adds: bool
) -> None:
    path = shutil.copy(sentencepiece_file, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.begin_id == (tokenizer.special_id("<s>") if adds else tokenizer.end_id)


def test_sentencepiece_end_token_is_its_eos(sentencepiece_file: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    inner = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert load_tokenizer(str(sentencepiece_file)).end_id == inner.eos_id() == inner.piece_to_id("</s>")


def test_fingerprint_is_the_hash_of_the_file(subword_file: Path) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    assert tokenizer.fingerprint == hashlib.sha256(subword_file.read_bytes()).hexdigest()


def test_bytes_stream_as_they_decode_whole() -> None:
    ids = random.Random(0).choices(range(259), k=4000) + list("日本🙂".encode()) + [0xE2, 0x82]
    tokenizer = ByteTokenizer()
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", TEXTS)
def test_subword_text_streams_as_it_decodes_whole(subword_file: Path, text: str) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    ids = tokenizer.encode(text.encode()).tolist()
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces), "a character was shown before all its bytes were there"


def test_streaming_after_a_prompt_keeps_the_space_before_the_first_word(subword_file: Path) -> None:
    tokenizer = load_tokenizer(str(subword_file))
    ids = tokenizer.encode(b"the quick brown fox jumps over the lazy dog").tolist()
    for split in range(1, len(ids)):
        stream = StreamDecoder(tokenizer, context=ids[:split])
        continued = "".join([stream.push(i) for i in ids[split:]] + [stream.finish()])
        assert tokenizer.decode(ids[:split]) + continued == tokenizer.decode(ids)


def test_a_long_subword_text_streams_as_it_decodes_whole(subword_file: Path) -> None:
    rng = random.Random(0)
    text = "".join(rng.choices("aé日本🙂🙃 \n.", k=2000))
    tokenizer = load_tokenizer(str(subword_file))
    ids = tokenizer.encode(text.encode()).tolist()
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(i) for i in ids] + [stream.finish()]) == tokenizer.decode(ids)


def test_invalid_bytes_from_a_subword_model_do_not_hold_the_stream_up(bpe_file: Path) -> None:
    tokenizer = load_tokenizer(str(bpe_file))
    lone_byte = int(tokenizer.encode("🙃".encode())[-1])
    stream = StreamDecoder(tokenizer)
    shown = "".join(stream.push(lone_byte) for _ in range(40))
    assert len(shown) >= 36


@pytest.mark.parametrize(
    ("name", "contents", "rule"),
    [
        ("missing.json", None, "no such file"),
        ("notes.txt", b"hello", "must be byte, or a file that ends in .json or .model"),
        ("tokenizer.json", b"not json", "is not a Hugging Face tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "is not a Hugging Face tokenizer.json"),
        ("junk.model", b"not a protobuf", "is not a SentencePiece model"),
    ],
)
def test_an_unusable_tokenizer_file_says_so(tmp_path: Path, name: str, contents: bytes | None, rule: str) -> None:
    if contents is not None:
        (tmp_path / name).write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path / name))
    assert str(caught.value).startswith(f"data.tokenizer={str(tmp_path / name)!r}: ")
    assert rule in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["tokenizers", "sentencepiece"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / {"tokenizers": "tokenizer.json", "sentencepiece": "a.model"}[package]
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match=rf"data\.tokenizer: needs the package {package}.*hybridlm\[hf\]"):
        load_tokenizer(str(path))
