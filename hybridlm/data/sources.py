"""Where documents come from: the running Python's own library, text files, JSON lines; and which are held out."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

from hybridlm import config
from hybridlm.config_check import ConfigError

# What counts as text in a directory. A file that is named itself is read whatever its name.
TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .htm .xml .json .yaml .yml .toml .ini .csv .tsv "
    ".py .pyi .c .h .cc .cpp .hpp .cu .cs .rs .go .java .kt .scala .swift .js .jsx .ts .tsx .css .sh .sql "
    ".rb .pl .php .lua .r .jl .hs .ml .el .lisp".split()
)
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path below the corpus, so that moving the corpus changes nothing."""

    name: str
    text: bytes


def read_documents(data: config.Data) -> list[Document]:
    """All non-empty documents of the corpus, in order of name (JSON lines: of file, then line).

    Raises:
        ConfigError: nothing to read, something unreadable, or text that the tokenizer cannot take.
    """
    match data.source:
        case "python-stdlib":
            documents = _python_stdlib(data)
        case "text":
            documents = _text_files(data)
        case "jsonl":
            documents = _json_lines(data)
    documents = [document for document in documents if document.text]
    if not documents:
        if data.source == "python-stdlib":
            raise ConfigError(
                "data.source", f"={data.source}: this Python has no .py files; use source=text with a path"
            )
        _refuse(data, "holds no text, every document is empty; give another file or directory")
    return documents


def split_documents(documents: Sequence[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents. A document's own name decides its side, so others may come and go.

    Of two or more documents each side has at least one. A single document is cut, its end is held out.
    """
    if len(documents) == 1:
        return _cut(documents[0], validation_fraction)
    ranks = {document.name: _rank(document.name) for document in documents}
    by_rank = sorted(ranks, key=lambda name: ranks[name])
    held_out = {name for name in by_rank if ranks[name] < validation_fraction} | {by_rank[0]}
    held_out.discard(by_rank[-1])
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def _rank(name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def _cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    cut = int(len(text) * (1 - validation_fraction))
    # Bytes 10xxxxxx continue a UTF-8 character, at most three of them.
    start = next((i for i in range(cut, min(cut + 4, len(text))) if text[i] & 0xC0 != 0x80), cut)
    train, validation = Document(document.name, text[:start]), Document(document.name, text[start:])
    if not train.text or not validation.text:
        raise ConfigError("data.path", f": the corpus has {len(text)} bytes, too few to hold any out; add text")
    return [train], [validation]


def _python_stdlib(data: config.Data) -> list[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    documents = [
        Document(name, _read(path, data)) for name, path in _walk(root, data, skip=NOT_STDLIB) if path.suffix == ".py"
    ]
    # A few of the library's own tests are broken on purpose, which only plain bytes can hold.
    return [document for document in documents if data.tokenizer == "byte" or _invalid_utf8(document.text) is None]


def _text_files(data: config.Data) -> list[Document]:
    root = _root(data)
    if root.is_dir():
        found = [(name, path) for name, path in _walk(root, data) if path.suffix.lower() in TEXT_SUFFIXES]
        if not found:
            _refuse(data, "no text files (.txt, .md, .py, ...) below this directory; name a file to read it as it is")
    else:
        found = [(root.name, root)]
    documents = [Document(name, _read(path, data)) for name, path in found]
    if data.tokenizer != "byte":
        for (_, path), document in zip(found, documents, strict=True):
            if (offset := _invalid_utf8(document.text)) is not None:
                _refuse(data, f"{path} is not UTF-8 at byte {offset}; correct it, or use data.tokenizer=byte")
    return documents


def _json_lines(data: config.Data) -> list[Document]:
    root = _root(data)
    if root.is_dir():
        found = [(name, path) for name, path in _walk(root, data) if name.endswith((".jsonl", ".jsonl.gz"))]
        if not found:
            _refuse(data, "no .jsonl or .jsonl.gz files below this directory; name a file to read it as it is")
    else:
        found = [(root.name, root)]
    return [document for name, path in found for document in _json_lines_of(name, path, data)]


def _json_lines_of(name: str, path: Path, data: config.Data) -> Iterator[Document]:
    number = 0
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
        with cast(BinaryIO, opened) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Document(f"{name}:{number}", _text_of(line, f"{path}:{number}", data))
    except (OSError, EOFError, zlib.error) as error:
        _refuse(data, f"cannot read {path} after line {number} ({error})")


def _text_of(line: bytes, where: str, data: config.Data) -> bytes:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        _refuse(data, f"{where} is not UTF-8 at byte {error.start} of the line; correct or remove the line")
    except (ValueError, RecursionError) as error:
        _refuse(data, f"{where} is not JSON ({error}); correct or remove the line")
    if not isinstance(record, dict):
        _refuse(data, f"{where} is not a JSON object; each line must hold one, with the text under a key")
    if data.text_key not in record:
        fields = ", ".join(map(str, record)) or "none"
        raise ConfigError("data.text_key", f"={data.text_key!r}: no such field at {where}; its fields are: {fields}")
    text = record[data.text_key]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ConfigError("data.text_key", f"={data.text_key!r}: must name a string, {where} holds a {kind}")
    try:
        return text.encode()
    except UnicodeEncodeError:
        _refuse(data, f"{where} holds half a surrogate pair, which is no character; correct or remove the line")


def _root(data: config.Data) -> Path:
    assert data.path is not None  # Data.check
    root = Path(data.path).expanduser()
    try:
        root.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        _refuse(data, f"{reason}; give a file or a directory that exists")
    return root


def _walk(root: Path, data: config.Data, skip: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """(name, path) of all regular files below `root`, by name.

    Leaves out what is hidden, directories that are links, and directories named in `skip`.
    """

    def fail(error: OSError) -> NoReturn:
        _refuse(data, f"cannot list {error.filename} ({error.strerror})")

    found = []
    for directory, subdirectories, files in os.walk(root, onerror=fail):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name not in skip]
        paths = (Path(directory, name) for name in files if not name.startswith("."))
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def _read(path: Path, data: config.Data) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        _refuse(data, f"cannot read {path} ({error.strerror}); correct its permissions or leave it out")


def _invalid_utf8(text: bytes) -> int | None:
    """Offset of the first byte that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def _refuse(data: config.Data, problem: str) -> NoReturn:
    if data.source == "python-stdlib":
        raise ConfigError("data.source", f"={data.source}: {problem}")
    raise ConfigError("data.path", f"={data.path!r}: {problem}")
