"""The safetensors format, read and written one tensor at a time (huggingface.co/docs/safetensors, "Format").

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor),
and the tensors' bytes. A model in several files has an index that says which file holds which tensor.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from hybridlm.config_check import ConfigError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
LARGEST_HEADER = 100_000_000
"""Bytes; the format allows no more."""

COMPARED_BYTES = 1 << 24


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int
    """Of its bytes in the file."""


class Tensors:
    """The tensors of a model's directory by name; each is read when it is asked for and kept by nobody."""

    def __init__(self, directory: Path):
        """Raises ConfigError where there are none, a file is missing, or one is no safetensors file."""
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        for file in _files_of(directory):
            self.entries.update(read_header(file))

    def read(self, name: str) -> np.ndarray:
        """The tensor, in the dtype that it is stored in."""
        entry = self.entries[name]
        array = np.empty(math.prod(entry.shape), entry.dtype)
        with entry.file.open("rb") as file:
            file.seek(entry.first)
            count = file.readinto(array.view(np.uint8).data)
        if count != array.nbytes:
            raise ConfigError(str(entry.file), f": ends within {name}; copy the file again")
        return array.reshape(entry.shape)

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors are the same bytes, of which a part is read at a time."""
        first, second = self.entries[name], self.entries[other]
        if (first.shape, first.dtype) != (second.shape, second.dtype):
            return False
        left = math.prod(first.shape) * first.dtype.itemsize
        with first.file.open("rb") as a, second.file.open("rb") as b:
            a.seek(first.first)
            b.seek(second.first)
            while left > 0:
                size = min(left, COMPARED_BYTES)
                if a.read(size) != b.read(size):
                    return False
                left -= size
        return True


def _files_of(directory: Path) -> list[Path]:
    if not directory.is_dir():
        raise ConfigError(str(directory), ": no such directory; give one with config.json and model.safetensors")
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ConfigError(str(index), ": is not an index of safetensors files") from None
        files = [directory / str(name) for name in names]
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(directory.glob(pattern))]
        told = "".join(f", and {name} is pickled, which is not read" for name in pickled[:1])
        raise ConfigError(str(directory), f": holds no {SINGLE} and no {INDEX}{told}; save the model as safetensors")
    for file in files:
        if not file.is_file():
            raise ConfigError(str(file), f": is named by {INDEX} and is not there; fetch it as well")
        if file.parent.resolve() != directory.resolve():
            raise ConfigError(str(index), f": names {file}, which lies outside the directory")
    return files


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a file. Raises ConfigError where it is no safetensors file, or cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LARGEST_HEADER, size - 8):
            raise ConfigError(str(file), ": is not a safetensors file, or was cut short")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(file, said, 8 + length) for name, said in header.items()}
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(str(file), ": is not a safetensors file: its header cannot be read") from None
    for name, entry in entries.items():
        if entry.first + math.prod(entry.shape) * entry.dtype.itemsize > size:
            raise ConfigError(str(file), f": ends before {name} does; copy the file again")
    return entries


def _entry(file: Path, said: Mapping[str, Any], start: int) -> Entry:
    dtype, shape = DTYPES.get(said["dtype"]), tuple(map(int, said["shape"]))
    if dtype is None:
        raise ConfigError(str(file), f": holds tensors of {said['dtype']}; known are {', '.join(DTYPES)}")
    first, last = said["data_offsets"]
    if not 0 <= first <= last or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(said)
    return Entry(file, dtype, shape, start + first)


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_model(
    directory: Path, planned: Sequence[Planned], values: Iterable[np.ndarray], *, shard_bytes: int
) -> list[Path]:
    """Write tensors, whose values come in the order of `planned`, to files of at most `shard_bytes`, or one tensor.

    More than one file get an index beside them. Returns the files.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in planned:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count, remaining = len(shards), iter(values)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for name, shard in zip(names, shards, strict=True):
        _write_file(directory / name, shard, remaining)
    if count > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in planned)}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def _write_file(path: Path, shard: Sequence[Planned], values: Iterator[np.ndarray]) -> None:
    codes = {dtype: code for code, dtype in DTYPES.items()}
    # Readers of the format, transformers among them, ask for the framework that the tensors are of.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for tensor in shard:
        place = [first, first + tensor.num_bytes]
        header[tensor.name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        first = place[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            value = np.asarray(next(values), order="C")
            assert value.shape == tensor.shape, (tensor, value.shape)
            with np.errstate(over="ignore"):
                written = value.astype(tensor.dtype, copy=False)
            if len(beyond := value[np.isinf(written) & np.isfinite(value)]):
                raise ConfigError(
                    "--dtype",
                    f": the largest value of {tensor.name} is {np.abs(beyond).max():.3g}, and that of {tensor.dtype} "
                    f"{float(ml_dtypes.finfo(tensor.dtype).max):.3g}; give one with a larger range",
                )
            stream.write(written.reshape(-1).view(np.uint8).data)
