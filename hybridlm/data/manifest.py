"""What a directory of prepared data holds: `manifest.json`, which is written last, when all shards are whole.

Everything here is plain JSON; the shards themselves are `hybridlm.data.shards`'.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenizerIdentity:
    """By which data and config tell whether they mean the same tokenizer."""

    name: str
    fingerprint: str
    version: str
    vocab_size: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        return cls(
            name=tokenizer.name,
            fingerprint=tokenizer.fingerprint,
            version=tokenizer.version,
            vocab_size=tokenizer.vocab_size,
            end_id=tokenizer.end_id,
        )


@dataclass(frozen=True)
class Shard:
    """One file: whole documents, in the order of the corpus."""

    name: str
    split: str
    part: int
    """Which part of the source it was made from; shards of a split follow each other in this order."""
    num_bytes: int
    blake2b: str
    num_tokens: int
    """Each document's `end_id` counted."""
    num_documents: int
    text_bytes: int

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise ValueError(f"a shard's name leads elsewhere: {self.name!r}")

    def problem(self, directory: Path, *, contents: bool) -> str | None:
        """What is wrong with the file, if anything: it is missing, of another size, or with `contents`, changed."""
        path = directory / self.name
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return "is missing"
        if size != self.num_bytes:
            return f"has {size:,} bytes, not {self.num_bytes:,}"
        if contents and checksum(path) != self.blake2b:
            return "has changed: its checksum differs"
        return None


@dataclass(frozen=True)
class Manifest:
    """All that is known of prepared data without opening a shard."""

    tokenizer: TokenizerIdentity
    record_tokens: int
    """Tokens of every record but the last of a shard."""
    plan: dict[str, Any]
    """The source and the settings it was made with; preparing again with the same ones has nothing to do."""
    shards: tuple[Shard, ...]

    def of_split(self, split: str) -> list[Shard]:
        """The shards of `split`, in order."""
        return sorted((shard for shard in self.shards if shard.split == split), key=lambda shard: shard.part)

    def totals(self) -> dict[str, dict[str, int]]:
        """Shards, tokens, documents, bytes of text and bytes on disk of each split."""
        return {
            split: {
                "shards": len(shards),
                "tokens": sum(shard.num_tokens for shard in shards),
                "documents": sum(shard.num_documents for shard in shards),
                "text_bytes": sum(shard.text_bytes for shard in shards),
                "num_bytes": sum(shard.num_bytes for shard in shards),
            }
            for split in SPLITS
            for shards in [self.of_split(split)]
        }

    def fingerprint(self, split: str) -> str:
        """Hash of what a split holds; where it differs, a run must not go on."""
        parts = [self.tokenizer.fingerprint, str(self.tokenizer.end_id), str(self.record_tokens)]
        parts += [shard.blake2b for shard in self.of_split(split)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def check_tokenizer(self, tokenizer: Tokenizer, where: Path) -> None:
        """Raise ConfigError where `tokenizer` is not the one that the data was made with."""
        mine, theirs = TokenizerIdentity.of(tokenizer), self.tokenizer
        if (mine.fingerprint, mine.end_id) != (theirs.fingerprint, theirs.end_id):
            raise ConfigError(
                "data.tokenizer",
                f"={mine.name!r} (fingerprint {mine.fingerprint[:16]}, end id {mine.end_id}): {where} was prepared "
                f"with {theirs.name!r} (fingerprint {theirs.fingerprint[:16]}, end id {theirs.end_id}); "
                "give that one, or prepare again",
            )

    def damaged_shards(self, directory: Path, *, contents: bool) -> Iterator[tuple[Shard, str]]:
        """Shards that are not as they were written, each with what is wrong; see `Shard.problem`."""
        for shard in self.shards:
            if (problem := shard.problem(directory, contents=contents)) is not None:
                yield shard, problem

    def write(self, directory: Path) -> None:
        """Into `directory`, whole or not at all."""
        contents = {"format": FORMAT, **asdict(self), "totals": self.totals()}
        write_json(directory / MANIFEST, contents)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Raises ConfigError where there is none, or none that this version reads."""
        path = directory / MANIFEST
        contents = read_json(path)
        if contents is None:
            raise ConfigError(str(path), ": no such file; `hybridlm prepare` makes one when it is done")
        if (found := contents.get("format")) != FORMAT:
            raise ConfigError(str(path), f": has format {found}, not {FORMAT}; prepare again")
        try:
            return cls(
                tokenizer=TokenizerIdentity(**contents["tokenizer"]),
                record_tokens=contents["record_tokens"],
                plan=contents["plan"],
                shards=tuple(Shard(**shard) for shard in contents["shards"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(str(path), f": is damaged ({error!r}); remove it and prepare again") from error


def checksum(path: Path) -> str:
    """BLAKE2b of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def write_json(path: Path, contents: Any) -> None:
    """Written beside, flushed to disk and renamed, so that the file is whole if it is there."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(contents, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file; raises ConfigError where it holds no JSON object."""
    try:
        contents = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(str(path), f": is damaged ({error}); remove it and prepare again") from error
    if not isinstance(contents, dict):
        raise ConfigError(str(path), ": is damaged (no JSON object); remove it and prepare again")
    return contents


def sync_directory(directory: Path) -> None:
    """Flush names to disk: a rename alone may be lost with the power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
