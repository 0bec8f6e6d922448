"""What `hybridlm prepare` reads, cut into pieces that processes take one at a time: text, JSON lines, Parquet, TFDS.

A source is a small value that pickles; each process opens for itself what it needs. Names of documents are those of
`hybridlm.data.sources`, so a corpus is split alike whether it is prepared or read as it is.
"""

import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data import sources
from hybridlm.data.sources import Document

# A Parquet row group is read by so many rows, which bounds memory.
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Piece:
    """Part of a file or dataset: bytes, rows or examples `begin` to `end`, whatever its source counts."""

    name: str
    """Of the file, below the corpus."""
    begin: int
    end: int
    first: int
    """Number of its first line, row or example in the whole file, from which names of documents are made."""
    num_bytes: int
    """About how much there is to read."""


@dataclass(frozen=True)
class File:
    """What tells that a file has not changed."""

    name: str
    num_bytes: int
    mtime_ns: int


class Source(Protocol):
    """A corpus that can be read in pieces."""

    def describe(self) -> dict[str, Any]:
        """JSON-able: what was asked for."""
        ...

    def files(self) -> list[File]:
        """All that it consists of, in order."""
        ...

    def pieces(self, num_bytes: int) -> Iterator[Piece]:
        """All of it in order, in pieces of about `num_bytes` where it can be cut at all."""
        ...

    def documents(self, piece: Piece) -> Iterator[Document]:
        """The documents of a piece, empty ones too; reads as it goes."""
        ...


@dataclass(frozen=True)
class _Files:
    """Files that `data` names. `data` is what the readers of `hybridlm.data.sources` take."""

    data: config.Data

    def describe(self) -> dict[str, Any]:
        return {"kind": self.data.source, "path": self.data.path}

    def found(self) -> list[tuple[str, Path]]:
        """(name, path), by name."""
        if self.data.source == "python-stdlib":
            return sources.stdlib_files(self.data)
        return sources.text_files(self.data)

    def files(self) -> list[File]:
        return [File(name, stat.st_size, stat.st_mtime_ns) for name, path in self.found() for stat in [path.stat()]]

    def pieces(self, num_bytes: int) -> Iterator[Piece]:
        for file in self.files():
            yield Piece(file.name, 0, file.num_bytes, 1, file.num_bytes)

    def path_of(self, piece: Piece) -> Path:
        if self.data.source == "python-stdlib":
            return sources.stdlib_root() / piece.name
        root = sources.root_of(self.data)
        return root / piece.name if root.is_dir() else root


class TextFiles(_Files):
    """A document per file."""

    def documents(self, piece: Piece) -> Iterator[Document]:
        path = self.path_of(piece)
        if self.data.source != "python-stdlib":
            yield sources.text_file(piece.name, path, self.data)
            return
        text = sources.read_file(path, self.data)
        # A few of the library's own tests are broken on purpose, which only plain bytes can hold.
        if self.data.tokenizer == "byte" or sources.invalid_utf8(text) is None:
            yield Document(piece.name, text)


class JsonLines(_Files):
    """A document per line. A plain file is cut between lines, a compressed one is a piece of its own."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"text_key": self.data.text_key}

    def found(self) -> list[tuple[str, Path]]:
        return sources.json_lines_files(self.data)

    def pieces(self, num_bytes: int) -> Iterator[Piece]:
        for name, path in self.found():
            size = path.stat().st_size
            if path.suffix == ".gz" or size <= num_bytes:
                yield Piece(name, 0, size, 1, size)
            else:
                yield from _pieces_of_lines(name, path, num_bytes)

    def documents(self, piece: Piece) -> Iterator[Document]:
        path = self.path_of(piece)
        end = None if path.suffix == ".gz" else piece.end
        return sources.json_lines_of(piece.name, path, self.data, begin=piece.begin, end=end, first=piece.first)


def _pieces_of_lines(name: str, path: Path, num_bytes: int) -> Iterator[Piece]:
    """Cuts after the line that reaches `num_bytes`; counts lines on the way."""
    with path.open("rb") as file:
        begin = position = 0
        first = line = 1
        while block := file.read(1 << 20):
            if position + len(block) - begin < num_bytes:
                line += block.count(b"\n")
                position += len(block)
                continue
            wanted = max(begin + num_bytes - position - 1, 0)
            cut = block.find(b"\n", wanted) + 1
            rest = file.readline() if not cut else b""
            end = position + (cut or len(block) + len(rest))
            line += block.count(b"\n", 0, cut or len(block)) + rest.count(b"\n")
            yield Piece(name, begin, end, first, end - begin)
            begin = position = end
            first = line
            file.seek(end)
        if position > begin:
            yield Piece(name, begin, position, first, position - begin)


class Parquet(_Files):
    """A document per row; cut between row groups."""

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"kind": "parquet", "text_key": self.data.text_key}

    def found(self) -> list[tuple[str, Path]]:
        root = sources.root_of(self.data)
        if not root.is_dir():
            return [(root.name, root)]
        found = [(name, path) for name, path in sources.walk(root, self.data) if name.endswith(".parquet")]
        if not found:
            sources.refuse(self.data, "no .parquet files below this directory; name a file to read it as it is")
        return found

    def pieces(self, num_bytes: int) -> Iterator[Piece]:
        for name, path in self.found():
            metadata = self._open(path).metadata
            begin, first, rows, size = 0, 1, 0, 0
            for group in range(metadata.num_row_groups):
                described = metadata.row_group(group)
                rows += described.num_rows
                size += described.total_byte_size
                if size >= num_bytes or group + 1 == metadata.num_row_groups:
                    yield Piece(name, begin, group + 1, first, size)
                    begin, first, rows, size = group + 1, first + rows, 0, 0

    def documents(self, piece: Piece) -> Iterator[Document]:
        path, key = self.path_of(piece), self.data.text_key
        file = self._open(path)
        fields = file.schema_arrow.names
        if key not in fields:
            raise ConfigError(
                "data.text_key", f"={key!r}: no such column in {path}; its columns are: {_listed(fields)}"
            )
        batches = file.iter_batches(PARQUET_ROWS, range(piece.begin, piece.end), [key], use_threads=False)
        row = piece.first
        while (values := self._next(batches, path, row)) is not None:
            for value in values:
                yield Document(f"{piece.name}:{row}", _text(value, f"{path}, row {row},", self.data))
                row += 1

    def _next(self, batches: Iterator[Any], path: Path, row: int) -> list[Any] | None:
        try:
            batch = next(batches, None)
        except (OSError, ValueError) as error:
            sources.refuse(self.data, f"cannot read {path} from row {row} on ({_first_line(error)})")
        return None if batch is None else batch.column(0).to_pylist()

    def _open(self, path: Path) -> Any:
        parquet = _import("pyarrow.parquet", "parquet")
        try:
            return parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            sources.refuse(self.data, f"cannot read {path} ({_first_line(error)}); give .parquet files")


@dataclass(frozen=True)
class Tfds:
    """An example of a tensorflow-datasets dataset per document, read without TensorFlow."""

    name: str
    """`NAME[/CONFIG][:VERSION]`."""
    split: str
    directory: str | None
    data: config.Data

    def describe(self) -> dict[str, Any]:
        return {"kind": "tfds", "path": self.name, "split": self.split, "text_key": self.data.text_key}

    def files(self) -> list[File]:
        directory = Path(self._dataset().dataset_info.data_dir)
        found = sources.walk(directory, self.data)
        return [File(name, stat.st_size, stat.st_mtime_ns) for name, path in found for stat in [path.stat()]]

    def pieces(self, num_bytes: int) -> Iterator[Piece]:
        dataset = self._dataset()
        info, count = dataset.dataset_info, len(dataset)
        # Of all splits: of a part of one TFDS does not know the bytes.
        example_bytes = max(1, int(info.dataset_size) // max(1, info.splits.total_num_examples))
        size = max(1, num_bytes // example_bytes)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            yield Piece(self.split, begin, end, begin, example_bytes * (end - begin))

    def documents(self, piece: Piece) -> Iterator[Document]:
        dataset, key = self._dataset(), self.data.text_key
        for index in range(piece.begin, piece.end):
            example = dataset[index]
            if not isinstance(example, dict) or key not in example:
                features = _listed(example) if isinstance(example, dict) else "none"
                raise ConfigError(
                    "data.text_key", f"={key!r}: {self.name} has no such feature; its features are: {features}"
                )
            where = f"{self.name}, example {index} of {self.split},"
            yield Document(f"{piece.name}:{index}", _text(example[key], where, self.data))

    def _dataset(self) -> Any:
        return _tfds_dataset(self.name, self.split, self.directory)


@functools.lru_cache(maxsize=4)
def _tfds_dataset(name: str, split: str, directory: str | None) -> Any:
    tfds = _import("tensorflow_datasets", "tfds")
    try:
        return tfds.data_source(name, split=split, data_dir=directory)
    except Exception as error:  # Nothing narrower covers unknown names, splits and missing data.
        raise ConfigError(
            "data.path",
            f"='tfds:{name}' with split {split!r}: {type(error).__name__}: {_first_line(error)}; "
            "give a dataset that is prepared as array_record below --tfds-dir, or one that TFDS can download",
        ) from error


def open_source(
    spec: str, *, text_key: str, tokenizer: str, split: str | None = None, tfds_directory: Path | None = None
) -> Source:
    """The source that `spec` names: `tfds:NAME`, `python-stdlib`, or a file or directory of what its suffix says.

    Raises:
        ConfigError: there is nothing of the kind.
    """
    if spec.startswith("tfds:"):
        if split is None:
            raise ConfigError("--split", f": is required by {spec}; give one, such as train or 'train[:10%]'")
        data = config.Data(source="text", path=spec, text_key=text_key, tokenizer=tokenizer)
        directory = None if tfds_directory is None else str(tfds_directory.expanduser())
        return Tfds(spec.removeprefix("tfds:"), split, directory, data)
    if split is not None or tfds_directory is not None:
        option, value = ("--split", split) if split is not None else ("--tfds-dir", tfds_directory)
        raise ConfigError(option, f" {value}: is about tfds:NAME, not about {spec!r}; leave it out")
    if spec == "python-stdlib":
        return TextFiles(config.Data(tokenizer=tokenizer))
    data = config.Data(source="text", path=spec, text_key=text_key, tokenizer=tokenizer)
    match _kind(sources.root_of(data), data):
        case "jsonl":
            return JsonLines(config.Data(source="jsonl", path=spec, text_key=text_key, tokenizer=tokenizer))
        case "parquet":
            return Parquet(data)
        case _:
            return TextFiles(data)


def _kind(root: Path, data: config.Data) -> str:
    """A directory is of JSON lines or Parquet where it holds any, but not where it holds both."""
    names = [name for name, _ in sources.walk(root, data)] if root.is_dir() else [root.name]
    kinds = {
        kind
        for kind, suffixes in (("jsonl", (".jsonl", ".jsonl.gz")), ("parquet", (".parquet",)))
        if any(name.endswith(suffixes) for name in names)
    }
    if len(kinds) > 1:
        sources.refuse(data, "holds both JSON lines and Parquet; give a directory or a file of one of them")
    return kinds.pop() if kinds else "text"


def _text(value: object, where: str, data: config.Data) -> bytes:
    """A text of a table's cell."""
    if isinstance(value, str):
        return value.encode()
    if not isinstance(value, bytes):
        kind = "null" if value is None else type(value).__name__
        raise ConfigError("data.text_key", f"={data.text_key!r}: must name a string, {where} holds a {kind}")
    if data.tokenizer != "byte" and (offset := sources.invalid_utf8(value)) is not None:
        sources.refuse(data, f"{where} is not UTF-8 at byte {offset}; correct it, or use data.tokenizer=byte")
    return value


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            "SOURCE", f": needs the package {package}; install it with pip install 'hybridlm[{extra}]'"
        ) from error
