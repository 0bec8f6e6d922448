"""Ids of a task as text, for people: numbers with spaces between them. Letters: t tokens."""

from collections.abc import Iterable
from typing import SupportsInt

import numpy as np
from jaxtyping import Integer


class Ids:
    """A tokenizer of no text: `3 0 12` are three ids, each of which stands for one byte."""

    name = fingerprint = "ids"
    version = "1"
    end_id = begin_id = 0

    def __init__(self, num_ids: int):
        self.vocab_size = num_ids

    def encode(self, data: bytes) -> Integer[np.ndarray, " t"]:
        return np.array(data.split(), np.int64)

    def encode_with_lengths(self, data: bytes) -> tuple[Integer[np.ndarray, " t"], Integer[np.ndarray, " t"]]:
        ids = self.encode(data)
        return ids, np.ones(len(ids), np.int64)

    def special_id(self, text: str) -> int | None:
        return None

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        return " ".join(str(int(i)) for i in ids)
