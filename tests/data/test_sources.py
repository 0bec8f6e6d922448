"""Documents: what is read, in what order, on which side of the split, and what is refused."""

import gzip
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.sources import Document, read_documents, split_documents

Write = Callable[[dict[str, bytes]], Path]


def names(documents: list[Document]) -> list[str]:
    return [document.name for document in documents]


def refusal(data: config.Data) -> str:
    with pytest.raises(ConfigError) as caught:
        read_documents(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_standard_library_is_megabytes_of_python_without_installed_packages() -> None:
    documents = read_documents(config.Data())
    assert sum(len(document.text) for document in documents) > 5_000_000
    assert "json/__init__.py" in names(documents) and all(name.endswith(".py") for name in names(documents))
    assert not any("site-packages" in name for name in names(documents))
    assert names(documents) == sorted(names(documents))


def test_the_standard_library_for_a_subword_tokenizer_is_valid_utf8() -> None:
    for document in read_documents(config.Data(tokenizer="tokenizer.json")):
        document.text.decode()


def test_a_directory_gives_its_text_files_by_name_without_hidden_or_empty_ones(write_files: Write) -> None:
    root = write_files(
        {
            "b.txt": b"b",
            "a/deep/c.md": b"c",
            "a.TXT": b"upper",
            "empty.txt": b"",
            "image.png": b"\x89",
            ".hidden.txt": b"no",
            ".git/x.txt": b"no",
        }
    )
    documents = read_documents(config.Data(source="text", path=str(root)))
    assert [(d.name, d.text) for d in documents] == [("a.TXT", b"upper"), ("a/deep/c.md", b"c"), ("b.txt", b"b")]


def test_a_file_given_by_name_is_read_whatever_its_name_and_bytes(write_files: Write) -> None:
    root = write_files({"corpus.weird": b"\xff\x00raw"})
    documents = read_documents(config.Data(source="text", path=str(root / "corpus.weird")))
    assert documents == [Document("corpus.weird", b"\xff\x00raw")]


def test_json_lines_are_read_plain_and_compressed(write_files: Write) -> None:
    plain = b'{"text": "one \xc3\xa9"}\n\n{"text": ""}\n{"text": "line\\u2028separator", "id": 3}'
    root = write_files({"b.jsonl": plain, "a.jsonl.gz": gzip.compress(b'{"text": "zipped"}\n'), "c.txt": b"no"})
    documents = read_documents(config.Data(source="jsonl", path=str(root)))
    assert [(d.name, d.text.decode()) for d in documents] == [
        ("a.jsonl.gz:1", "zipped"),
        ("b.jsonl:1", "one é"),
        ("b.jsonl:4", "line\u2028separator"),
    ]


@pytest.mark.parametrize(
    ("line", "field", "rule"),
    [
        (b"{not json}", "data.path", "is not JSON"),
        (b'["a list"]', "data.path", "is not a JSON object"),
        (b'{"text": "\xff"}', "data.path", "is not UTF-8 at byte 10 of the line"),
        (b'{"text": "\\ud800"}', "data.path", "half a surrogate pair"),
        (b"[" * 100_000, "data.path", "is not JSON"),
        (b'{"body": "x", "id": 1}', "data.text_key", "no such field"),
        (b'{"text": 7}', "data.text_key", "must name a string"),
    ],
)
def test_a_broken_json_line_is_named(write_files: Write, line: bytes, field: str, rule: str) -> None:
    root = write_files({"a.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    message = refusal(config.Data(source="jsonl", path=str(root)))
    assert message.startswith(field + "=") and rule in message and f"{root / 'a.jsonl'}:2" in message


def test_a_truncated_gzip_file_is_named(write_files: Write) -> None:
    whole = gzip.compress(
        b"".join(json.dumps({"text": str(random.Random(i).random())}).encode() + b"\n" for i in range(999))
    )
    root = write_files({"a.jsonl.gz": whole[:-20]})
    assert f"cannot read {root / 'a.jsonl.gz'} after line" in refusal(config.Data(source="jsonl", path=str(root)))


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "nowhere")
    expected = f"data.path={path!r}: No such file or directory; give a file or a directory that exists"
    assert refusal(config.Data(source="text", path=path)) == expected
    assert refusal(config.Data(source="jsonl", path=path)) == expected


@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_a_directory_without_matching_files_is_refused(write_files: Write, source: str) -> None:
    root = write_files({"image.png": b"\x89"})
    assert "below this directory; name a file" in refusal(config.Data(source=source, path=str(root)))


def test_a_corpus_of_empty_files_is_refused(write_files: Write) -> None:
    root = write_files({"a.txt": b"", "b.txt": b""})
    assert refusal(config.Data(source="text", path=str(root))).startswith(f"data.path={str(root)!r}: holds no text")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that even root cannot read")
def test_an_unreadable_file_is_named() -> None:
    message = refusal(config.Data(source="text", path="/proc/self/mem"))
    assert message.startswith("data.path='/proc/self/mem': cannot read /proc/self/mem (Input/output error)")


def test_bytes_that_are_not_utf8_are_refused_for_subword_tokenizers_only(write_files: Write) -> None:
    root = write_files({"a.txt": b"fine", "b.txt": b"caf\xe9"})
    message = refusal(config.Data(source="text", path=str(root), tokenizer="tokenizer.json"))
    assert f"{root / 'b.txt'} is not UTF-8 at byte 3" in message and "data.tokenizer=byte" in message
    assert read_documents(config.Data(source="text", path=str(root)))[1].text == b"caf\xe9"


def test_the_split_keeps_every_document_and_about_the_fraction() -> None:
    documents = [Document(f"d{i}", b"x") for i in range(2000)]
    train, validation = split_documents(documents, 0.1)
    assert sorted(names(train) + names(validation)) == sorted(names(documents))
    # Binomial(2000, 0.1) has standard deviation 13.
    assert abs(len(validation) - 200) < 60


def test_a_document_keeps_its_side_when_others_come_and_go() -> None:
    documents = [Document(f"d{i}", b"x") for i in range(500)]
    held_out = set(names(split_documents(documents, 0.2)[1]))
    some = random.Random(0).sample(documents, 250) + [Document("new", b"y")]
    assert set(names(split_documents(some, 0.2)[1])) - {"new"} == held_out & set(names(some))


@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5])
def test_two_documents_give_one_to_each_side(fraction: float) -> None:
    for i in range(40):
        train, validation = split_documents([Document(f"a{i}", b"x"), Document(f"b{i}", b"y")], fraction)
        assert len(train) == len(validation) == 1


def test_a_single_document_is_cut_at_its_end() -> None:
    text = bytes(range(65, 91)) * 10
    train, validation = split_documents([Document("a", text)], 0.1)
    assert (train[0].text, validation[0].text) == (text[:234], text[234:])


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.23, 0.37, 0.5])
def test_a_cut_does_not_split_a_character(fraction: float) -> None:
    text = "aé日🙂" * 7
    train, validation = split_documents([Document("a", text.encode())], fraction)
    assert train[0].text.decode() + validation[0].text.decode() == text


def test_a_document_too_short_to_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.path: the corpus has 1 bytes, too few to hold any out"):
        split_documents([Document("a", b"x")], 0.02)
