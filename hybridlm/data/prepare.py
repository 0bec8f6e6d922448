"""`hybridlm prepare`: a corpus to shards of tokens, part by part, each part a function of its number alone.

The source is cut into parts; a part gives one shard for each side of the split that it has documents on. Parts can be
made in any order, by any process, twice: the bytes are the same. What is not finished lies in DIR/unfinished: the plan,
and a small file per part that is done. The manifest comes last, and with it that directory goes.
"""

import functools
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridlm.config_check import ConfigError
from hybridlm.data.manifest import (
    MANIFEST,
    Manifest,
    Shard,
    TokenizerIdentity,
    checksum,
    read_json,
    sync_directory,
    write_json,
)
from hybridlm.data.prepare_sources import Piece, Source
from hybridlm.data.shards import ShardWriter
from hybridlm.data.sources import Document, cut, rank
from hybridlm.data.tokenizers import Tokenizer, load_tokenizer

UNFINISHED = "unfinished"
PLAN = "plan.json"
# A corpus up to this size is read once more beforehand, for the names of its documents: see `decide_sides`.
SMALL_CORPUS = 32 << 20

Part = tuple[Piece, ...]
Advance = Callable[[int], None]
"""Told how many bytes of the source have been worked through since it was told before."""


@dataclass(frozen=True)
class Sides:
    """Which documents are held out: by the rank of their names, as `sources.split_documents` does."""

    validation_fraction: float
    exceptions: Mapping[str, str]
    """Sides of documents whose names alone would decide otherwise."""
    single: bool
    """There is one document only, which is cut."""

    def split(self, document: Document) -> list[tuple[str, Document]]:
        """What of `document` goes to which split."""
        if self.single:
            (train,), (validation,) = cut(document, self.validation_fraction)
            return [("train", train), ("validation", validation)]
        held_out = rank(document.name) < self.validation_fraction
        return [(self.exceptions.get(document.name, "validation" if held_out else "train"), document)]


@dataclass(frozen=True)
class Job:
    """What every process has to know."""

    source: Source
    tokenizer: str
    directory: Path
    record_tokens: int
    sides: Sides


def plan_of(
    source: Source, tokenizer: Tokenizer, *, shard_bytes: int, record_tokens: int, validation_fraction: float
) -> dict[str, Any]:
    """All that decides the contents of the shards, JSON-able; and, under `source`, what people call it."""
    files = source.files()
    listing = "\n".join(f"{file.name}\0{file.num_bytes}\0{file.mtime_ns}" for file in files)
    described = source.describe()
    return {
        "source": described | {"files": len(files), "bytes": sum(file.num_bytes for file in files)},
        "decides": {
            **{f"source's {name}": value for name, value in described.items() if name != "path"},
            "names, sizes and times of the source's files": hashlib.sha256(
                listing.encode(errors="surrogateescape")
            ).hexdigest(),
            "tokenizer": tokenizer.fingerprint,
            "tokenizer's version": tokenizer.version,
            "tokenizer's end id": tokenizer.end_id,
            "bytes of a shard": shard_bytes,
            "tokens of a record": record_tokens,
            "share held out": validation_fraction,
        },
    }


def parts_of(source: Source, shard_bytes: int) -> Iterator[Part]:
    """All pieces of `source` in order, as many together as reach `shard_bytes`."""
    part: list[Piece] = []
    size = 0
    for piece in source.pieces(shard_bytes):
        part.append(piece)
        size += piece.num_bytes
        if size >= shard_bytes:
            yield tuple(part)
            part, size = [], 0
    if part:
        yield tuple(part)


def size_of(parts: Iterable[Part]) -> int:
    """Bytes there are to read, about."""
    return sum(piece.num_bytes for part in parts for piece in part)


def decide_sides(source: Source, parts: Sequence[Part], validation_fraction: float) -> Sides:
    """Of two or more documents, the lowest in rank is held out and the highest is not; a single one is cut.

    For that the names must be known first, which takes reading the source. In a large one rank alone decides.
    """
    if validation_fraction == 0:
        return Sides(0, {}, single=False)
    if size_of(parts) > SMALL_CORPUS and sum(map(len, parts)) > 1:
        return Sides(validation_fraction, {}, single=False)
    count, lowest, highest = 0, (1.0, ""), (0.0, "")
    for part in parts:
        for piece in part:
            for document in source.documents(piece):
                if document.text:
                    ranked = (rank(document.name), document.name)
                    count, lowest, highest = count + 1, min(lowest, ranked), max(highest, ranked)
    if count < 2:
        return Sides(validation_fraction, {}, single=True)
    return Sides(validation_fraction, {lowest[1]: "validation", highest[1]: "train"}, single=False)


def prepare_part(job: Job, number: int, part: Part, advance: Advance = lambda num_bytes: None) -> list[Shard]:
    """Make the shards of one part, and leave a note that they are done."""
    tokenizer = _tokenizer(job.tokenizer)
    unfinished = job.directory / UNFINISHED
    with tempfile.TemporaryDirectory(prefix=f"part-{number:05d}-", dir=unfinished) as temporary:
        writers: dict[str, ShardWriter] = {}
        for piece in part:
            seen = 0
            for document in job.source.documents(piece):
                if not document.text:
                    continue
                for split, side in job.sides.split(document):
                    if split not in writers:
                        writers[split] = ShardWriter(
                            Path(temporary, _shard_name(split, number)),
                            record_tokens=job.record_tokens,
                            end_id=tokenizer.end_id,
                            vocab_size=tokenizer.vocab_size,
                        )
                    writers[split].add(*tokenizer.encode_with_lengths(side.text), len(side.text))
                step = min(len(document.text), piece.num_bytes - seen)
                seen += step
                advance(step)
            advance(piece.num_bytes - seen)
        shards = [_publish(job, split, number, writers[split]) for split in sorted(writers)]
    sync_directory(job.directory)
    _write_note(job.directory, number, shards)
    return shards


def _publish(job: Job, split: str, number: int, writer: ShardWriter) -> Shard:
    writer.close()
    name = _shard_name(split, number)
    shard = Shard(
        name=name,
        split=split,
        part=number,
        num_bytes=writer.path.stat().st_size,
        blake2b=checksum(writer.path),
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        text_bytes=writer.text_bytes,
    )
    writer.path.replace(job.directory / name)
    return shard


def begin(directory: Path, plan: Mapping[str, Any], num_parts: int, *, verify: bool) -> Manifest | set[int]:
    """The manifest, where all is done; else the parts that are done, with `directory` made ready for the others.

    Shards that were lost or cut short since are made again; with `verify`, those whose contents have changed too.

    Raises:
        ConfigError: `directory` holds something else.
    """
    unfinished = directory / UNFINISHED
    if (directory / MANIFEST).exists():
        manifest = Manifest.read(directory)
        _check_plan(manifest.plan, plan, directory)
        lost = set[int]()
        for shard, problem in manifest.damaged_shards(directory, contents=verify):
            print(f"{directory / shard.name} {problem}; it is made again", file=sys.stderr)
            lost.add(shard.part)
        if not lost:
            shutil.rmtree(unfinished, ignore_errors=True)  # left over where the last run was killed at its very end
            return manifest
        unfinished.mkdir(exist_ok=True)
        write_json(unfinished / PLAN, plan)
        for number in set(range(num_parts)) - lost:
            _write_note(directory, number, [shard for shard in manifest.shards if shard.part == number])
        (directory / MANIFEST).unlink()
    else:
        directory.mkdir(parents=True, exist_ok=True)
        there = read_json(unfinished / PLAN)
        if there is None and any(path.name != UNFINISHED for path in directory.iterdir()):
            raise ConfigError(f"--out {directory}", ": is not empty, and no prepared data; give another directory")
        # Before the first part is done there is nothing to go on with, and other settings do no harm.
        if there is not None and any(directory.glob("*.array_record")):
            _check_plan(there, plan, directory)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            write_json(unfinished / PLAN, plan)
    return {number for number in range(num_parts) if is_done(directory, number, verify=verify)}


def is_done(directory: Path, number: int, *, verify: bool = False) -> bool:
    """Whether a part has been noted as done and its shards are there, with `verify` unchanged."""
    if not (directory / UNFINISHED / _note_name(number)).exists():
        return False
    return all(shard.problem(directory, contents=verify) is None for shard in _noted(directory, number))


def finish(directory: Path, tokenizer: Tokenizer, plan: dict[str, Any], num_parts: int, record_tokens: int) -> Manifest:
    """Write the manifest of what all parts gave.

    Raises:
        ConfigError: that is nothing at all.
    """
    shards = [shard for number in range(num_parts) for shard in _noted(directory, number)]
    if not shards:
        raise ConfigError("SOURCE", f"={plan['source']['path']!r}: holds no text, every document is empty")
    manifest = Manifest(TokenizerIdentity.of(tokenizer), record_tokens, plan, tuple(shards))
    manifest.write(directory)
    shutil.rmtree(directory / UNFINISHED)
    return manifest


def _check_plan(there: Mapping[str, Any], plan: Mapping[str, Any], directory: Path) -> None:
    theirs, mine = there["decides"], plan["decides"]
    for name in [*mine, *(theirs.keys() - mine.keys())]:
        if theirs.get(name) != mine.get(name):
            raise ConfigError(
                f"--out {directory}",
                f": what it holds was prepared with other settings ({name}: {theirs.get(name)} then, {mine.get(name)} "
                "now); give another directory, or prepare as before",
            )


def _noted(directory: Path, number: int) -> list[Shard]:
    note = read_json(directory / UNFINISHED / _note_name(number))
    assert note is not None
    return [Shard(**shard) for shard in note["shards"]]


def _write_note(directory: Path, number: int, shards: Sequence[Shard]) -> None:
    write_json(directory / UNFINISHED / _note_name(number), {"shards": [asdict(shard) for shard in shards]})


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.array_record"


def _note_name(number: int) -> str:
    return f"part-{number:05d}.json"


@functools.cache
def _tokenizer(spec: str) -> Tokenizer:
    return load_tokenizer(spec)
