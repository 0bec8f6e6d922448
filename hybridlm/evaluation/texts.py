"""Documents to be evaluated on: tokens, bytes, words and domain of each."""

import gzip
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from hybridlm import config
from hybridlm.config_check import ConfigError, suggestion
from hybridlm.config_data import TextSource
from hybridlm.data.conversations import begins_with_conversation
from hybridlm.data.corpus import text_of
from hybridlm.data.packing import Stream
from hybridlm.data.sources import Document, json_lines_files, read_documents, split_documents
from hybridlm.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class Text:
    """A document of n targets: its tokens and its end."""

    name: str
    domain: str
    tokens: Int[np.ndarray, " _"]
    """n + 1: `begin_id`, the tokens of the text, `end_id`; int32."""
    num_bytes: int
    num_words: int
    """Maximal runs of what is not white space."""

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1


def data_from_spec(data: config.Data, spec: str) -> config.Data:
    """The text that `--data` names: `python-stdlib`, prepared data, text files, or a .jsonl file (or .jsonl.gz).

    JSON lines may be texts, or conversations that the template of `data` makes texts of.
    """
    alone = replace(data, mixture=(), stages=(), source="python-stdlib", path=None)
    if spec == "python-stdlib":
        return alone
    if (Path(spec).expanduser() / "manifest.json").is_file():
        return replace(alone, source="prepared", path=spec)
    if not spec.endswith((".jsonl", ".jsonl.gz")):
        return replace(alone, source="text", path=spec)
    lines = replace(alone, source="jsonl", path=spec)
    return replace(lines, source="chat") if begins_with_conversation(lines) else lines


def read_texts(data: config.Data, tokenizer: Tokenizer, *, whole: bool, domain_field: str | None = None) -> list[Text]:
    """The documents of `data`, those held out or the `whole`, in the order in which they are packed.

    The domain is the value of `domain_field` of JSON lines; where that is absent the file, of a mixture `part/file`,
    and of prepared data, which has no files, the source.

    Raises ConfigError where there is no usable text, or the field is not there.
    """
    named = cast(TextSource, data.source)  # tasks are refused as they are read
    sources = data.mixture or (config.Part(name=named, source=named, path=data.path, text_key=data.text_key),)
    texts: list[Text] = []
    for source in sources:
        alone = replace(data, source=source.source, path=source.path, text_key=source.text_key, mixture=(), stages=())
        prefix = f"{source.name}/" if data.mixture else ""
        if source.source == "prepared":
            if domain_field is not None:
                raise ConfigError(
                    f"--domain-field={domain_field}", ": is a field of JSON lines, and prepared data keeps none of them"
                )
            texts += _prepared(source, tokenizer, whole, prefix)
            continue
        if source.source == "chat":
            raise ConfigError(
                "data.source",
                "=chat: losses of conversations are those of answers in packed windows; of the options leave only "
                "--data, --context and --json",
            )
        documents = read_documents(alone)
        if not whole:
            _, documents = split_documents(documents, data.validation_fraction)
        domains = None if domain_field is None else _values(alone, domain_field)
        for document in documents:
            file = prefix + (document.name.rpartition(":")[0] if alone.source == "jsonl" else document.name)
            texts.append(_text(document, file if domains is None else domains[document.name], tokenizer))
    return texts


def _text(document: Document, domain: str, tokenizer: Tokenizer) -> Text:
    ids = np.asarray(tokenizer.encode(document.text), np.int32)
    tokens = np.concatenate([[tokenizer.begin_id], ids, [tokenizer.end_id]]).astype(np.int32)
    return Text(document.name, domain, tokens, len(document.text), len(document.text.split()))


def _prepared(source: config.Part, tokenizer: Tokenizer, whole: bool, prefix: str) -> Iterator[Text]:
    from hybridlm.data.shards import PreparedStream  # Its package is not there for every platform.

    assert source.path is not None  # Part.check
    directory = Path(source.path).expanduser()
    for split in ("train", "validation") if whole else ("validation",):
        stream: Stream = PreparedStream(directory, split)
        borders = [*stream.document_starts().tolist(), stream.num_targets]
        for number, (start, end) in enumerate(itertools.pairwise(borders), 1):
            tokens, num_bytes, _ = stream.read(start, end + 1)
            words = len(text_of(tokens[1:-1], tokenizer).split())
            total = int(np.sum(num_bytes, dtype=np.int64))
            tokens = np.concatenate([[tokenizer.begin_id], tokens[1:]]).astype(np.int32)
            yield Text(f"{split}:{number}", f"{prefix}{split}", tokens, total, words)


def _values(data: config.Data, field: str) -> dict[str, str]:
    """That of `field` by the names of documents."""
    if data.source != "jsonl":
        raise ConfigError(f"--domain-field={field}", f": is a field of JSON lines, and the text is {data.source}")
    values: dict[str, str] = {}
    for name, path in json_lines_files(data):
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record: dict[str, Any] = json.loads(line.decode("utf-8-sig"))  # read_documents has read it before
                if field not in record:
                    known = [str(key) for key in record]
                    hint = suggestion(field, known) or f"; its fields are: {', '.join(known)}"
                    raise ConfigError(f"--domain-field={field}", f": no such field at {path}:{number}{hint}")
                values[f"{name}:{number}"] = str(record[field])
    return values


def sentences(texts: Sequence[bytes]) -> Iterator[bytes]:
    """Their sentences and lines, each with the white space behind it."""
    for text in texts:
        yield from re.findall(rb"[^.!?\n]+(?:[.!?\n]+\s*|$)|[.!?\n]+\s*", text)
