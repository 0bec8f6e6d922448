"""Token streams of subword tokenizers kept on disk, since tokenising takes minutes where reading takes none.

One directory per stream below `$XDG_CACHE_HOME/hybridlm/tokens` (or ~/.cache), named by the hash of the documents, the
tokenizer file and the version of its package: it never goes stale, and may be deleted at any time.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybridlm.data.packing import TokenStream, tokenize
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer, Tokenizer

log = logging.getLogger(__name__)

ARRAYS = ("tokens", "num_bytes", "starts")


def content_hash(documents: Sequence[Document]) -> str:
    """SHA-256 of the documents' texts and of where one ends and the next begins."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.text).to_bytes(8, "big"))
        digest.update(document.text)
    return digest.hexdigest()


def cached_tokenize(documents: Sequence[Document], tokenizer: Tokenizer, *, shared: bool = False) -> TokenStream:
    """`tokenize`, from disk if it was done before. Bytes need no cache, except to be `shared` with other processes."""
    if isinstance(tokenizer, ByteTokenizer) and not shared:
        return tokenize(documents, tokenizer)
    key = (tokenizer.fingerprint, tokenizer.version, str(tokenizer.end_id), content_hash(documents))
    directory = cache_root() / hashlib.sha256("\n".join(key).encode()).hexdigest()
    if directory.is_dir():
        try:
            return _load(directory, tokenizer)
        except (OSError, ValueError, EOFError) as error:
            log.warning("Tokenising again: %s is damaged (%s).", directory, error)
            shutil.rmtree(directory, ignore_errors=True)
    stream = tokenize(documents, tokenizer)
    try:
        _save(stream, directory)
        return _load(directory, tokenizer) if shared else stream
    except OSError as error:
        log.warning("The tokenised corpus is not kept for the next run: cannot write %s (%s).", directory, error)
    return stream


def cache_root() -> Path:
    """Where streams are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hybridlm" / "tokens"


def _load(directory: Path, tokenizer: Tokenizer) -> TokenStream:
    arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    return TokenStream(**arrays, end_id=tokenizer.end_id)


def _save(stream: TokenStream, directory: Path) -> None:
    """Written beside and renamed into place, so that a directory is whole if it is there."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix="unfinished-", dir=directory.parent))
    try:
        for name in ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(stream, name))
        try:
            temporary.rename(directory)
        except OSError:
            if not directory.exists():  # else another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
