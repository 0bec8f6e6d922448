"""Token streams in ArrayRecord files, read at any place without loading them. Letters: t tokens, d documents, r bytes.

A shard holds whole documents as `hybridlm.data.packing`'s stream does, an `end_id` before each, cut into records of a
fixed number of tokens; only a shard's last record may be shorter. So token n of a split is in the shard that a search
of few numbers finds and in the record that a division finds. The `end_id` that closes the stream is not stored.

A record, little-endian: HEADER, then token ids, bytes of text per token, and where in it documents start. One more
record follows a shard's last: where in the shard all its documents start, as 8-byte integers.
"""

import functools
import os
import struct
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int64, Integer, UInt

from hybridlm.config_check import ConfigError
from hybridlm.data.manifest import SPLITS, Manifest, Shard

HEADER = struct.Struct("<IIBB")
"""Tokens, documents that start, bytes of a token id, bytes of a number of bytes."""
# One record is one chunk, so that reading one decompresses one; zstd's lowest level writes twice as fast as the default
# for 2 % more bytes.
WRITER_OPTIONS = "group_size:1,zstd:1"
# No reading ahead, no threads: a window needs one record or two.
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
MAX_OPEN_SHARDS = 128
CACHED_RECORDS = 4

Span = tuple[UInt[np.ndarray, " t"], UInt[np.ndarray, " t"], Int64[np.ndarray, " d"]]
"""Token ids, the bytes of text each stands for, and where in them documents start."""


Decoded = TypeVar("Decoded")


class DamagedShard(OSError):
    """A shard, or a record of it, cannot be read or is not what was written."""


def encode_record(tokens: np.ndarray, num_bytes: np.ndarray, starts: np.ndarray) -> bytes:
    """The bytes of one record. `tokens` and `num_bytes` are unsigned; `starts` counts from the record's first token."""
    width = np.min_scalar_type(num_bytes.max(initial=0))
    header = HEADER.pack(len(tokens), len(starts), tokens.itemsize, width.itemsize)
    parts = (_little(tokens), _little(num_bytes.astype(width)), _little(starts.astype(np.uint32)))
    return header + b"".join(part.tobytes() for part in parts)


def decode_record(record: bytes) -> Span:
    """What `encode_record` was given. Raises ValueError where `record` is none of its."""
    if len(record) < HEADER.size:
        raise ValueError(f"{len(record)} bytes are no record")
    length, num_starts, token_width, bytes_width = HEADER.unpack_from(record)
    if token_width not in (2, 4) or bytes_width not in (1, 2, 4, 8):
        raise ValueError(f"no integers have {token_width} and {bytes_width} bytes")
    expected = HEADER.size + length * (token_width + bytes_width) + num_starts * 4
    if len(record) != expected:
        raise ValueError(f"{len(record)} bytes where its header says {expected}")
    offset = HEADER.size
    tokens = np.frombuffer(record, f"<u{token_width}", length, offset)
    offset += length * token_width
    num_bytes = np.frombuffer(record, f"<u{bytes_width}", length, offset)
    offset += length * bytes_width
    return tokens, num_bytes, np.frombuffer(record, "<u4", num_starts, offset).astype(np.int64)


def _little(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


class ShardWriter:
    """Documents to one shard. `close` makes the file whole; without it there is none of use."""

    def __init__(self, path: Path, *, record_tokens: int, end_id: int, vocab_size: int):
        self.path, self.record_tokens = path, record_tokens
        self.num_tokens = self.num_documents = self.text_bytes = 0
        self._dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._end = np.array([end_id], self._dtype)
        self._writer = ArrayRecordWriter(str(path), WRITER_OPTIONS)
        # Tokens that do not fill a record yet.
        self._tokens: list[np.ndarray] = []
        self._num_bytes: list[np.ndarray] = []
        self._starts: list[int] = []
        self._pending = 0
        self._documents = array("Q")

    def add(self, ids: Integer[np.ndarray, " t"], lengths: Integer[np.ndarray, " t"], text_bytes: int) -> None:
        """The next document, as its tokenizer encodes it."""
        self._starts.append(self._pending)
        self._documents.append(self.num_tokens)
        self._tokens += [self._end, ids.astype(self._dtype)]
        self._num_bytes += [np.zeros(1, np.uint8), lengths.astype(np.min_scalar_type(lengths.max(initial=0)))]
        self._pending += 1 + len(ids)
        self.num_tokens += 1 + len(ids)
        self.num_documents += 1
        self.text_bytes += text_bytes
        if self._pending >= self.record_tokens:
            self._flush(self._pending - self._pending % self.record_tokens)

    def close(self) -> None:
        """Write what is left, and to disk."""
        if self._pending:
            self._flush(self._pending)
        self._write(np.array(self._documents, "<u8").tobytes())
        try:
            self._writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {self.path} ({str(error).splitlines()[0]})") from error
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _write(self, record: bytes) -> None:
        try:
            self._writer.write(record)
        except RuntimeError as error:
            raise OSError(f"cannot write {self.path} ({str(error).splitlines()[0]})") from error

    def _flush(self, count: int) -> None:
        """Write the first `count` pending tokens."""
        tokens, num_bytes = np.concatenate(self._tokens), np.concatenate(self._num_bytes)
        starts = np.array(self._starts, np.int64)
        for begin in range(0, count, self.record_tokens):
            end = min(begin + self.record_tokens, count)
            first, last = np.searchsorted(starts, [begin, end])
            self._write(encode_record(tokens[begin:end], num_bytes[begin:end], starts[first:last] - begin))
        self._tokens, self._num_bytes = [tokens[count:]], [num_bytes[count:]]
        self._starts = (starts[np.searchsorted(starts, count) :] - count).tolist()
        self._pending -= count


class PreparedStream:
    """One split of a directory that `hybridlm prepare` made, as one stream; what `packing.TokenStream` is in memory.

    Pickles without its open files, and may be read by several threads.

    Raises:
        ConfigError: there is no manifest, or a shard is missing or of another size.
    """

    def __init__(self, directory: str | Path, split: str):
        if split not in SPLITS:
            raise ConfigError("split", f"={split!r}: prepared data has {' and '.join(SPLITS)}")
        self.directory, self.split = Path(directory), split
        try:
            self.manifest = Manifest.read(self.directory)
        except ConfigError as error:
            raise ConfigError("data.path", f"={str(directory)!r}: {error}") from error
        for shard, problem in self.manifest.damaged_shards(self.directory, contents=False):
            raise ConfigError(
                "data.path", f"={str(directory)!r}: {shard.name} {problem}; the same `hybridlm prepare` makes it again"
            )
        self.end_id = self.manifest.tokenizer.end_id
        self._dtype = np.uint16 if self.manifest.tokenizer.vocab_size <= 2**16 else np.uint32
        self._shards: Sequence[Shard] = self.manifest.of_split(split)
        self._begins = np.concatenate([[0], np.cumsum([shard.num_tokens for shard in self._shards], dtype=np.int64)])
        self._open_files()

    @property
    def num_targets(self) -> int:
        """Predictions in one epoch: all tokens of text and the ends of the documents."""
        return int(self._begins[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of what it holds; where it differs, a run must not go on."""
        return self.manifest.fingerprint(self.split)

    def read(self, begin: int, end: int) -> Span:
        """Tokens `begin` to `end` of the stream, whose length is `num_targets + 1`.

        Document starts count from `begin`.

        Raises:
            DamagedShard: a record cannot be read or is not what was written.
        """
        if not 0 <= begin <= end <= self.num_targets + 1:
            raise IndexError(f"tokens {begin} to {end} of {self.num_targets + 1}")
        tokens, num_bytes, starts = [], [], []
        for shard, record, at, first, last in self._places(begin, min(end, self.num_targets)):
            ids, lengths, inside = self._record(shard, record)
            tokens.append(ids[first:last])
            num_bytes.append(lengths[first:last])
            low, high = np.searchsorted(inside, [first, last])
            starts.append(inside[low:high] + (at - first - begin))
        if begin <= self.num_targets < end:
            tokens.append(np.array([self.end_id], self._dtype))
            num_bytes.append(np.zeros(1, np.uint8))
        if len(tokens) == 1:
            return tokens[0], num_bytes[0], starts[0] if starts else np.zeros(0, np.int64)
        return (
            np.concatenate([np.zeros(0, self._dtype), *tokens]),
            np.concatenate([np.zeros(0, np.uint8), *num_bytes]),
            np.concatenate([np.zeros(0, np.int64), *starts]),
        )

    def loss_weights(self, begin: int, end: int) -> int:
        """All tokens count alike."""
        return 1

    def document_starts(self) -> Int64[np.ndarray, " d"]:
        """Where all documents of the stream start; reads a few bytes for each, and no tokens.

        Raises:
            DamagedShard: as `read`.
        """
        starts = [np.zeros(0, np.int64)]
        for number, (shard, begin) in enumerate(zip(self._shards, self._begins[:-1], strict=True)):
            index = -(-shard.num_tokens // self.manifest.record_tokens)
            inside = self._raw_record(number, index, lambda record: np.frombuffer(record, "<u8"))
            if len(inside) != shard.num_documents:
                raise self._damaged(shard, f"record {index}", f"{len(inside)} documents, not {shard.num_documents}")
            starts.append(inside.astype(np.int64) + begin)
        return np.concatenate(starts)

    def verify(self) -> list[str]:
        """One line for each shard of the split that is not what was written; reads all of them."""
        problems = ((shard, shard.problem(self.directory, contents=True)) for shard in self._shards)
        return [f"{self.directory / shard.name} {problem}" for shard, problem in problems if problem is not None]

    def _places(self, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(shard, record, begin in the stream, begin and end within the record) of what `begin` to `end` is in."""
        size = self.manifest.record_tokens
        while begin < end:
            shard = int(np.searchsorted(self._begins, begin, side="right")) - 1
            record, first = divmod(begin - int(self._begins[shard]), size)
            last = min(size, first + min(end, int(self._begins[shard + 1])) - begin)
            yield shard, record, begin, first, last
            begin += last - first

    def _record(self, shard: int, record: int) -> Span:
        key = (shard, record)
        with self._lock:
            if key in self._records:
                self._records.move_to_end(key)
                return self._records[key]
        described, size = self._shards[shard], self.manifest.record_tokens
        span = self._raw_record(shard, record, decode_record)
        expected = min(size, described.num_tokens - record * size)
        if len(span[0]) != expected:
            raise self._damaged(described, f"record {record}", f"{len(span[0])} tokens, not {expected}")
        with self._lock:
            self._records[key] = span
            if len(self._records) > CACHED_RECORDS:
                self._records.popitem(last=False)
        return span

    def _raw_record(self, shard: int, record: int, decode: Callable[[bytes], Decoded]) -> Decoded:
        with self._lock:
            reader = self._reader(shard)
        try:
            return decode(reader.read([record])[0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise self._damaged(self._shards[shard], f"record {record}", error) from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        described = self._shards[shard]
        try:
            reader = ArrayRecordReader(str(self.directory / described.name), READER_OPTIONS)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(described, "its index", error) from error
        self._readers[shard] = reader
        if len(self._readers) > MAX_OPEN_SHARDS:
            # Not closed here, since another thread may be reading it: closed when the last of them lets go.
            self._readers.popitem(last=False)
        return reader

    def _damaged(self, shard: Shard, what: str, problem: Exception | str) -> DamagedShard:
        reason = (str(problem).splitlines() or ["unreadable"])[0]
        return DamagedShard(
            f"{self.directory / shard.name}: {what} is damaged ({reason}); "
            "the same `hybridlm prepare` with --verify makes the shard again"
        )

    def _open_files(self) -> None:
        self._lock = threading.Lock()
        self._readers: OrderedDict[int, ArrayRecordReader] = OrderedDict()
        self._records: OrderedDict[tuple[int, int], Span] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_readers", "_records")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open_files()
