"""Where documents come from: the running Python's own library, text files, JSON lines; and which are held out."""

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence, Set
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
            documents = [text_file(name, path, data) for name, path in text_files(data)]
        case "jsonl":
            documents = [d for name, path in json_lines_files(data) for d in json_lines_of(name, path, data)]
        case "prepared" | "chat":
            refuse(data, f"is read otherwise where source={data.source}; there are no documents in it")
        case task:
            raise ConfigError("data.source", f"={task}: is a task, which has no documents; name a source of text")
    documents = [document for document in documents if document.text]
    if not documents:
        if data.source == "python-stdlib":
            raise ConfigError(
                "data.source", f"={data.source}: this Python has no .py files; use source=text with a path"
            )
        refuse(data, "holds no text, every document is empty; give another file or directory")
    return documents


def split_documents(documents: Sequence[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Training and validation documents. A document's own name decides its side, so others may come and go.

    Of two or more documents each side has at least one. A single document is cut, its end is held out.
    """
    if len(documents) == 1:
        return cut(documents[0], validation_fraction)
    ranks = {document.name: rank(document.name) for document in documents}
    by_rank = sorted(ranks, key=lambda name: ranks[name])
    held_out = {name for name in by_rank if ranks[name] < validation_fraction} | {by_rank[0]}
    held_out.discard(by_rank[-1])
    train = [document for document in documents if document.name not in held_out]
    return train, [document for document in documents if document.name in held_out]


def rank(name: str) -> float:
    """Uniform in [0, 1)."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


def cut(document: Document, validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """All but the end of `document`, and its end."""
    text = document.text
    wanted = int(len(text) * (1 - validation_fraction))
    # Bytes 10xxxxxx continue a UTF-8 character, at most three of them.
    start = next((i for i in range(wanted, min(wanted + 4, len(text))) if text[i] & 0xC0 != 0x80), wanted)
    train, validation = Document(document.name, text[:start]), Document(document.name, text[start:])
    if not train.text or not validation.text:
        raise ConfigError("data.path", f": the corpus has {len(text)} bytes, too few to hold any out; add text")
    return [train], [validation]


def _python_stdlib(data: config.Data) -> list[Document]:
    documents = [Document(name, read_file(path, data)) for name, path in stdlib_files(data)]
    # A few of the library's own tests are broken on purpose, which only plain bytes can hold.
    return [document for document in documents if data.tokenizer == "byte" or invalid_utf8(document.text) is None]


def stdlib_root() -> Path:
    """Where the running Python's own modules are."""
    return Path(sysconfig.get_path("stdlib"))


def stdlib_files(data: config.Data) -> list[tuple[str, Path]]:
    """(name, path) of them."""
    return [(name, path) for name, path in walk(stdlib_root(), data, skip=NOT_STDLIB) if path.suffix == ".py"]


def text_files(data: config.Data) -> list[tuple[str, Path]]:
    """(name, path) of the file at `data.path`, or of the text files below it."""
    root = root_of(data)
    if not root.is_dir():
        return [(root.name, root)]
    found = [(name, path) for name, path in walk(root, data) if path.suffix.lower() in TEXT_SUFFIXES]
    if not found:
        refuse(data, "no text files (.txt, .md, .py, ...) below this directory; name a file to read it as it is")
    return found


def text_file(name: str, path: Path, data: config.Data) -> Document:
    """A file as one document, which the tokenizer can take."""
    text = read_file(path, data)
    if data.tokenizer != "byte" and (offset := invalid_utf8(text)) is not None:
        refuse(data, f"{path} is not UTF-8 at byte {offset}; correct it, or use data.tokenizer=byte")
    return Document(name, text)


def json_lines_files(data: config.Data) -> list[tuple[str, Path]]:
    """(name, path) of the file at `data.path`, or of the files of JSON lines below it."""
    root = root_of(data)
    if not root.is_dir():
        return [(root.name, root)]
    found = [(name, path) for name, path in walk(root, data) if name.endswith((".jsonl", ".jsonl.gz"))]
    if not found:
        refuse(data, "no .jsonl or .jsonl.gz files below this directory; name a file to read it as it is")
    return found


def json_lines_of(
    name: str,
    path: Path,
    data: config.Data,
    *,
    begin: int = 0,
    end: int | None = None,
    first: int = 1,
    read: Callable[[bytes, str, config.Data], bytes] | None = None,
) -> Iterator[Document]:
    """The documents of one file, or of the lines from byte `begin` to `end` of it, of which `first` is the first.

    `read` makes a document's text of a line, and of what it is called in errors; without it, it is under a key.
    """
    read = read or _text_of
    number = first - 1
    try:
        opened = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
        with cast(BinaryIO, opened) as lines:
            if begin:
                lines.seek(begin)
            position = begin
            for number, line in enumerate(lines, first):
                if line.strip():
                    yield Document(f"{name}:{number}", read(line, f"{path}:{number}", data))
                position += len(line)
                if end is not None and position >= end:
                    break
    except (OSError, EOFError, zlib.error) as error:
        refuse(data, f"cannot read {path} after line {number} ({error})")


def _text_of(line: bytes, where: str, data: config.Data) -> bytes:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        refuse(data, f"{where} is not UTF-8 at byte {error.start} of the line; correct or remove the line")
    except (ValueError, RecursionError) as error:
        refuse(data, f"{where} is not JSON ({error}); correct or remove the line")
    if not isinstance(record, dict):
        refuse(data, f"{where} is not a JSON object; each line must hold one, with the text under a key")
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
        refuse(data, f"{where} holds half a surrogate pair, which is no character; correct or remove the line")


def root_of(data: config.Data) -> Path:
    """`data.path`, which exists."""
    assert data.path is not None  # Data.check
    root = Path(data.path).expanduser()
    try:
        root.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        refuse(data, f"{reason}; give a file or a directory that exists")
    return root


def walk(root: Path, data: config.Data, skip: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """(name, path) of all regular files below `root`, by name.

    Leaves out what is hidden, directories that are links, and directories named in `skip`.
    """

    def fail(error: OSError) -> NoReturn:
        refuse(data, f"cannot list {error.filename} ({error.strerror})")

    found = []
    for directory, subdirectories, files in os.walk(root, onerror=fail):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".") and name not in skip]
        paths = (Path(directory, name) for name in files if not name.startswith("."))
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def read_file(path: Path, data: config.Data) -> bytes:
    """All of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        refuse(data, f"cannot read {path} ({error.strerror}); correct its permissions or leave it out")


def invalid_utf8(text: bytes) -> int | None:
    """Offset of the first byte that is not UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    return None


def refuse(data: config.Data, problem: str) -> NoReturn:
    """Raise ConfigError about what `data` names."""
    if data.source == "python-stdlib":
        raise ConfigError("data.source", f"={data.source}: {problem}")
    raise ConfigError("data.path", f"={data.path!r}: {problem}")
