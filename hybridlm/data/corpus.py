"""The text of a run: its sources read, split, tokenised and windowed, each on its own."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
from jaxtyping import Integer

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.config_data import TextSource
from hybridlm.data.chat import answers_of, tokenize_conversations
from hybridlm.data.conversations import read_conversations
from hybridlm.data.first_fit import first_fit
from hybridlm.data.mixture import quantise
from hybridlm.data.order import Mixture, Source, only
from hybridlm.data.packing import Examples, JoinedWindows, Stream, Windows
from hybridlm.data.sources import read_documents, split_documents
from hybridlm.data.synthetic.ids import Ids
from hybridlm.data.synthetic.windows import held_out_windows, training_windows
from hybridlm.data.token_cache import cached_tokenize, content_hash
from hybridlm.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Part:
    """One source, tokenised."""

    name: str
    train: tuple[Stream, ...]
    """One, or none where all text is held out."""
    validation: tuple[Stream, ...]
    content: tuple[str, ...]
    """Hashes of what both hold."""
    held_out_text: Callable[[], bytes]
    description: str
    packing: Literal["concatenate", "first-fit"]
    """Of the training text."""
    is_conversations: bool = False
    """Which are whole in held-out windows too."""


@dataclass(frozen=True)
class Corpus:
    """Text of a run, ready to be drawn from."""

    train: Mixture
    validation: Examples
    """Of all sources, one after the other; concatenated whatever the packing, so that losses compare."""
    tokenizer: Tokenizer
    fingerprint: str
    """Hash of texts, split, tokenizer, seq_len and packing: where it differs, a run must not resume."""
    description: str
    """One line for people."""
    parts: tuple[Part, ...]

    def validation_bytes(self) -> bytes:
        """The held-out text, for baselines on the same bytes."""
        return b"".join(part.held_out_text() for part in self.parts)


def load_corpus(data: config.Data) -> Corpus:
    """Read, split, tokenise and window the corpus that `data` describes; or make the examples of its task.

    Raises:
        ConfigError: there is no usable text, or less of it for training than one sequence.
    """
    if data.task is not None:
        return _task_corpus(data.source, data.task, data.seq_len)
    tokenizer = load_tokenizer(data.tokenizer)
    parts = _load_parts(data, tokenizer, whole=False)
    for part in parts:
        num_targets = part.train[0].num_targets
        if num_targets < data.seq_len:
            whose = f"the training text of {part.name}" if data.mixture else "the training text"
            raise ConfigError(
                "data.seq_len",
                f"={data.seq_len}: {whose} has only {num_targets} tokens; seq_len may be at most {num_targets}, or add "
                "text",
            )
    stages = _stages(data)
    sources = [_source(part, data, tokenizer) for part in parts]
    return _corpus(data, tokenizer, parts, Mixture(tuple(sources), stages))


def tokenizer_of(data: config.Data) -> Tokenizer:
    """That of the text, or what writes the ids of a task."""
    return load_tokenizer(data.tokenizer) if data.task is None else Ids(data.task.num_ids)


def _task_corpus(name: str, task: config.Task, seq_len: int) -> Corpus:
    train, held_out = training_windows(task, seq_len), held_out_windows(task, seq_len)
    lengths = train.lengths
    described = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return Corpus(
        train=only(train, name, train.fingerprint()),
        validation=held_out,
        tokenizer=Ids(task.num_ids),
        fingerprint=hashlib.sha256((train.fingerprint() + held_out.fingerprint()).encode()).hexdigest(),
        description=f"task {name} ({task.num_ids:,} ids), {described} {task.unit}; {len(train):,} examples to train "
        f"on, {len(held_out):,} held out",
        parts=(),
    )


def load_whole(data: config.Data) -> Corpus:
    """Like `load_corpus`, but all of the text is held out and none is for training."""
    tokenizer = load_tokenizer(data.tokenizer)
    return _corpus(data, tokenizer, _load_parts(data, tokenizer, whole=True), Mixture((), ()))


def _corpus(data: config.Data, tokenizer: Tokenizer, parts: Sequence[Part], train: Mixture) -> Corpus:
    held_out = [_held_out(stream, part, data, tokenizer) for part in parts for stream in part.validation]
    validation = held_out[0] if len(held_out) == 1 else JoinedWindows(held_out)
    if not len(validation):
        raise ConfigError("data", ": no text is held out; prepare it with some validation documents")
    identity = [_identity(part, data, tokenizer) for part in parts]
    return Corpus(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        fingerprint=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        description=_description(data, tokenizer, parts, train),
        parts=tuple(parts),
    )


def _held_out(stream: Stream, part: Part, data: config.Data, tokenizer: Tokenizer) -> Windows:
    layout = first_fit(stream, data.seq_len) if part.is_conversations else None
    return Windows(stream, data.seq_len, layout, tokenizer.begin_id)


def _stages(data: config.Data) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The first batch of each stage, and the places of each source in its period."""
    if not data.mixture:
        return ((0, (1,)),)
    weights = {part.name: part.weight for part in data.mixture}
    described = [("data.mixture", 0, weights)]
    for i, stage in enumerate(data.stages):
        by_name = stage.by_name()
        described.append((f"data.stages.{i}.weights", stage.first_step, {name: by_name[name] for name in weights}))
    stages = []
    for where, first, weights in described:
        try:
            stages.append((first, quantise(weights)))
        except ValueError as error:
            raise ConfigError(where, f": {error}") from None
    return tuple(stages)


def _source(part: Part, data: config.Data, tokenizer: Tokenizer) -> Source:
    [stream] = part.train
    layout = first_fit(stream, data.seq_len) if part.packing == "first-fit" else None
    windows = Windows(stream, data.seq_len, layout, tokenizer.begin_id)
    return Source(part.name, windows, _identity(part, data, tokenizer))


def _identity(part: Part, data: config.Data, tokenizer: Tokenizer) -> str:
    """Hash of all that the windows of `part` depend on."""
    begin = () if tokenizer.begin_id == tokenizer.end_id else (str(tokenizer.begin_id),)
    fields = (tokenizer.fingerprint, str(tokenizer.end_id), *begin, str(data.seq_len), part.packing, *part.content)
    return hashlib.sha256("\n".join(fields).encode()).hexdigest()


def _load_parts(data: config.Data, tokenizer: Tokenizer, *, whole: bool) -> list[Part]:
    if not data.mixture:
        source = cast(TextSource, data.source)  # tasks have no documents, and were gone another way
        part = config.Part(name=source, source=source, path=data.path, text_key=data.text_key)
        return [_load_part(part, data, tokenizer, whole)]
    parts = []
    for i, part in enumerate(data.mixture):
        try:
            parts.append(_load_part(part, data, tokenizer, whole))
        except ConfigError as error:
            # Readers know of one source only.
            head, _, field = error.path.partition(".")
            if head == "data" and field in ("source", "path", "text_key"):
                raise ConfigError(f"data.mixture.{i}.{field}", error.message) from None
            raise
    return parts


def _load_part(part: config.Part, data: config.Data, tokenizer: Tokenizer, whole: bool) -> Part:
    if part.source == "prepared":
        return _prepared(part, data, tokenizer, whole)
    if part.source == "chat":
        return _conversations(part, data, tokenizer, whole)
    alone = replace(data, source=part.source, path=part.path, text_key=part.text_key, mixture=(), stages=())
    documents = read_documents(alone)
    train, validation = ([], documents) if whole else split_documents(documents, data.validation_fraction)
    shared = data.workers > 0
    return Part(
        name=part.name,
        train=() if whole else (cached_tokenize(train, tokenizer, shared=shared),),
        validation=(cached_tokenize(validation, tokenizer),),
        content=(content_hash(train), content_hash(validation)),
        held_out_text=lambda: b"".join(document.text for document in validation),
        description=_described(
            part.source if part.path is None else f"{part.source} {part.path}",
            len(documents),
            sum(len(document.text) for document in documents),
        ),
        packing=data.packing,
    )


def _conversations(part: config.Part, data: config.Data, tokenizer: Tokenizer, whole: bool) -> Part:
    documents = read_conversations(
        replace(data, source=part.source, path=part.path, mixture=(), stages=()), whole=whole
    )
    train, validation = ([], documents) if whole else split_documents(documents, data.validation_fraction)
    made = [
        tokenize_conversations(of_side, tokenizer, data.chat, data.seq_len)
        for of_side in (train, validation)
        if of_side
    ]
    truncated, dropped = sum(one.num_truncated for one in made), sum(one.num_dropped for one in made)
    streams = tuple((one.stream,) for one in made)
    return Part(
        name=part.name,
        train=() if whole else streams[0],
        validation=streams[-1],
        content=(content_hash(train), content_hash(validation), repr(data.chat)),
        held_out_text=lambda: answers_of(validation, data.chat),
        description=f"{part.source} {part.path}: {len(documents):,} conversations, {data.chat.template}, "
        f"{truncated:,} truncated and {dropped:,} dropped",
        packing="first-fit",
        is_conversations=True,
    )


def _prepared(part: config.Part, data: config.Data, tokenizer: Tokenizer, whole: bool) -> Part:
    from hybridlm.data.shards import PreparedStream  # Its package is not there for every platform.

    assert part.path is not None  # Part.check
    directory = Path(part.path).expanduser()
    train, validation = PreparedStream(directory, "train"), PreparedStream(directory, "validation")
    train.manifest.check_tokenizer(tokenizer, directory)
    totals, source = train.manifest.totals().values(), train.manifest.plan["source"]
    held_out = (train, validation) if whole else (validation,)
    return Part(
        name=part.name,
        train=() if whole else (train,),
        validation=held_out,
        content=(train.fingerprint, validation.fingerprint),
        held_out_text=lambda: b"".join(_text_of(stream, tokenizer) for stream in held_out),
        description=_described(
            f"prepared {part.path} from {source['path'] or source['kind']}",
            sum(total["documents"] for total in totals),
            sum(total["text_bytes"] for total in totals),
        ),
        packing=data.packing,
    )


def _text_of(stream: Stream, tokenizer: Tokenizer) -> bytes:
    borders = [*stream.document_starts().tolist(), stream.num_targets]
    return b"".join(text_of(stream.read(start + 1, end)[0], tokenizer) for start, end in itertools.pairwise(borders))


def text_of(ids: Integer[np.ndarray, " t"], tokenizer: Tokenizer) -> bytes:
    """The text that was tokenised: of bytes as it was, of subwords as they decode."""
    return tokenizer.decode_bytes(ids) if isinstance(tokenizer, ByteTokenizer) else tokenizer.decode(ids).encode()


def _described(source: str, num_documents: int, num_bytes: int) -> str:
    return f"{source}: {num_documents:,} documents, {num_bytes / 1e6:,.1f} MB"


def _description(data: config.Data, tokenizer: Tokenizer, parts: Sequence[Part], train: Mixture) -> str:
    if data.mixture:
        total = sum(part.weight for part in data.mixture)
        shares = [f"{part.name} {part.weight / total:.4g}" for part in data.mixture]
        described = [f"{share} ({part.description})" for share, part in zip(shares, parts, strict=True)]
        head = "mixture of " + ", ".join(described)
        if data.stages:
            head += ", other weights from batch " + " and ".join(f"{stage.first_step:,}" for stage in data.stages)
    else:
        head = parts[0].description
    to_train, held_out = (
        sum(stream.num_targets for part in parts for stream in streams(part))
        for streams in (lambda part: part.train, lambda part: part.validation)
    )
    lines = [
        head,
        f"tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids)",
        f"{to_train:,} tokens to train on, {held_out:,} held out",
    ]
    if train.sources and all(part.packing == "first-fit" for part in parts):
        positions = sum(len(source.windows) for source in train.sources) * data.seq_len
        lines.append(f"whole documents in sequences, of which {1 - to_train / positions:.2%} is padding")
    return "; ".join(lines)
