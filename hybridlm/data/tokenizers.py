"""From bytes of text to token ids and back: plain bytes, Hugging Face `tokenizer.json`, SentencePiece `.model`.

Nothing is ever fetched: a tokenizer is "byte" or a local file. Letters: t tokens of one text.
"""

import codecs
import hashlib
import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, SupportsInt, runtime_checkable

import numpy as np
from jaxtyping import Integer

from hybridlm.config_check import ConfigError

# In order of preference, for a tokenizer.json that has no tokenizer_config.json beside it.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the framework needs of a tokenizer. Ids run from 0 to `vocab_size - 1`, `end_id` among them."""

    vocab_size: int
    end_id: int
    """Stands between documents: the last target of one."""
    begin_id: int
    """The first input of a document: what its model's own tokenizer puts before text, such as `<s>`, else `end_id`."""
    name: str
    fingerprint: str
    """`byte`, or the SHA-256 of the tokenizer file."""
    version: str
    """Of the package that splits text; part of the key of cached tokens."""

    def encode(self, data: bytes) -> Integer[np.ndarray, " t"]:
        """Ids of the text alone; markup that looks like a special token is ordinary text."""
        ...

    def encode_with_lengths(self, data: bytes) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        """Ids, and how many bytes of `data` each stands for; the lengths of t >= 1 tokens sum to `len(data)`."""
        ...

    def special_id(self, text: str) -> int | None:
        """The id of the special token that is written like this, such as `<|im_start|>`; None where it is none."""
        ...

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """Text for display: invalid UTF-8 becomes U+FFFD; `end_id` and ids outside the vocabulary become nothing."""
        ...


class ByteTokenizer:
    """One token per byte, lossless for any bytes; id 256 is the end of a document."""

    vocab_size = 257
    end_id = begin_id = 256
    name = "byte"
    fingerprint = "byte"
    version = "1"

    def encode(self, data: bytes) -> Integer[np.ndarray, " t"]:
        return np.frombuffer(data, np.uint8)

    def encode_with_lengths(self, data: bytes) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        return self.encode(data), np.ones(len(data), np.uint8)

    def special_id(self, text: str) -> int | None:
        return None

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[SupportsInt]) -> bytes:
        """The exact bytes."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256)


class HuggingFaceTokenizer:
    """A `tokenizer.json` file. Its end token is tokenizer_config.json's `eos_token` if that file lies beside it, else
    the first of `END_TOKENS` that it knows, else one more id after its vocabulary. Documents begin with what the file's
    post-processor puts before text, as in transformers 5, which heeds no `add_bos_token` beside a tokenizer.json."""

    def __init__(self, path: Path, contents: bytes):
        tokenizers = _import("tokenizers")
        try:
            inner = tokenizers.Tokenizer.from_str(contents.decode())
        except Exception as error:  # The package raises nothing narrower.
            raise _unusable(path, "a Hugging Face tokenizer.json", error) from error
        # A saved truncation length would silently cut every document.
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        put_before = _put_before_text(inner)
        # Instead of the file's own, which only adds special tokens and trims spaces off the offsets we count bytes by.
        inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
        self._inner: Any = inner
        self.name = str(path)
        self.version: str = tokenizers.__version__
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        num_known = max(inner.get_vocab().values(), default=-1) + 1
        candidates = (_configured_end_token(path), *END_TOKENS)
        known = (inner.token_to_id(token) for token in candidates if token is not None)
        self.end_id: int = next((i for i in known if i is not None), num_known)
        self.vocab_size: int = max(num_known, self.end_id + 1)
        self.begin_id: int = self.end_id if put_before is None else put_before
        added = inner.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}

    def encode(self, data: bytes) -> Integer[np.ndarray, " t"]:
        return np.array(self._inner.encode(data.decode(), add_special_tokens=False).ids, np.uint32)

    def encode_with_lengths(self, data: bytes) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        text = data.decode()
        encoding = self._inner.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.uint32), _byte_lengths(text, encoding.offsets)

    def special_id(self, text: str) -> int | None:
        return self._special.get(text)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._inner.decode(_displayable(ids, self), skip_special_tokens=False)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. The end token is its `eos`, or one more id after its vocabulary if it has none.
    Documents begin with its `bos` where `add_bos_token` is true in the tokenizer_config.json beside it."""

    def __init__(self, path: Path, contents: bytes):
        sentencepiece = _import("sentencepiece")
        try:
            self._inner: Any = sentencepiece.SentencePieceProcessor(model_proto=contents)
        except (RuntimeError, OSError, ValueError) as error:
            raise _unusable(path, "a SentencePiece model", error) from error
        self.name = str(path)
        self.version: str = sentencepiece.__version__
        self.fingerprint = hashlib.sha256(contents).hexdigest()
        num_known, end_id = self._inner.vocab_size(), self._inner.eos_id()
        self.end_id: int = end_id if end_id >= 0 else num_known
        self.vocab_size: int = max(num_known, self.end_id + 1)
        begins = _tokenizer_config(path).get("add_bos_token") and self._inner.bos_id() >= 0
        self.begin_id: int = self._inner.bos_id() if begins else self.end_id

    def encode(self, data: bytes) -> Integer[np.ndarray, " t"]:
        return np.array(self._inner.encode(data.decode()), np.uint32)

    def encode_with_lengths(self, data: bytes) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        text = data.decode()
        mapping = self._inner.encode_as_offset_mapping(text)
        return np.array(mapping["ids"], np.uint32), _byte_lengths(text, mapping["offsets"])

    def special_id(self, text: str) -> int | None:
        i = self._inner.piece_to_id(text)
        return i if self._inner.is_control(i) else None

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return self._inner.decode(_displayable(ids, self))


def load_tokenizer(spec: str) -> Tokenizer:
    """`byte`, or the tokenizer in a local `*.json` (Hugging Face) or `*.model` (SentencePiece) file."""
    if spec == "byte":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    if not path.exists():
        raise ConfigError("data.tokenizer", f"={spec!r}: no such file; give byte, a tokenizer.json or a .model file")
    if path.is_dir() or path.suffix not in kinds:
        raise ConfigError("data.tokenizer", f"={spec!r}: must be byte, or a file that ends in .json or .model")
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise ConfigError("data.tokenizer", f"={spec!r}: cannot be read ({error.strerror})") from error
    return kinds[path.suffix](path, contents)


class StreamDecoder:
    """Text piece by piece while ids arrive; a character is shown once all its bytes are there.

    `context` holds ids that were shown before, such as the prompt's: some tokenizers drop the space before a first
    word. The pieces and `finish()` joined are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[SupportsInt] = ()):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # A few tokens back are enough to decode the next one, so that its cost does not grow with the text.
        self._ids = [int(i) for i in context][-8:]
        self._num_shown = len(self._complete())

    def push(self, token_id: SupportsInt) -> str:
        """The text that `token_id` completes, often empty in the middle of a character."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))
        self._ids.append(int(token_id))
        text = self._complete()
        piece = text[self._num_shown :]
        if len(self._ids) > 32:
            self._ids = self._ids[-8:]
            text = self._complete()
        self._num_shown = len(text)
        return piece

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never ended, else nothing."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[self._num_shown :]

    def _complete(self) -> str:
        """The recent text without a character that may be unfinished: up to 3 of its 4 bytes, each shown as U+FFFD."""
        text = self._tokenizer.decode(self._ids)
        return text[: max(len(text.rstrip("\ufffd")), len(text) - 3)]


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ConfigError(
            "data.tokenizer", f": needs the package {package}; install it with pip install 'hybridlm[hf]'"
        ) from error


def _unusable(path: Path, kind: str, error: Exception) -> ConfigError:
    return ConfigError("data.tokenizer", f"={str(path)!r}: is not {kind} ({str(error).splitlines()[0]})")


def _put_before_text(inner: Any) -> int | None:
    """The first special token that the post-processor of a tokenizer.json adds before text; None where it adds none."""
    encoding = inner.encode("a", add_special_tokens=True)
    return encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None


def _tokenizer_config(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer; empty where there is none."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        return dict(json.loads(beside.read_bytes()).items())
    except (ValueError, AttributeError) as error:
        raise _unusable(beside, "a JSON object", error) from error


def _configured_end_token(path: Path) -> str | None:
    """`eos_token` of the tokenizer_config.json beside a tokenizer.json."""
    token = _tokenizer_config(path).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token


def _displayable(ids: Iterable[SupportsInt], tokenizer: Tokenizer) -> list[int]:
    return [i for i in map(int, ids) if 0 <= i < tokenizer.vocab_size and i != tokenizer.end_id]


def _byte_lengths(text: str, offsets: Sequence[tuple[int, int]]) -> Integer[np.ndarray, " t"]:
    """UTF-8 bytes from the end of the token before to the end of each token, given as characters of `text`.

    Characters a tokenizer skips count with the token after them, at the end of the text with the last. Of tokens that
    share one character, one gets all its bytes and the others none.
    """
    if not offsets:
        return np.zeros(0, np.uint32)
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    ends = np.concatenate([[0], np.cumsum(widths)])[[end for _, end in offsets]]
    ends[-1] = widths.sum()
    return np.diff(np.maximum.accumulate(ends), prepend=0).astype(np.uint32)
