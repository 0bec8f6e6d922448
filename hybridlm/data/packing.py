"""Documents to windows of one length, concatenated then split. Letters: n stream, d documents, t time.

The stream is, for every document, one `end_id` and then its tokens; one more `end_id` closes it. So `end_id` begins
each document as an input, which makes its first token a prediction too, and ends it as a target. Within an epoch
every token of text is a target exactly once, and so is the end of every document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, Shaped, UInt

from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import Tokenizer

Window = dict[str, Shaped[np.ndarray, " t"]]


@dataclass(frozen=True)
class TokenStream:
    """Tokenised documents, one after the other."""

    tokens: UInt[np.ndarray, " n"]
    num_bytes: UInt[np.ndarray, " n"]
    """Bytes of text each token stands for; 0 for `end_id`."""
    starts: Int64[np.ndarray, " d"]
    """Where each document's first `end_id` stands."""
    end_id: int

    @property
    def num_targets(self) -> int:
        """Predictions in one epoch: all tokens of text and the ends of the documents."""
        return len(self.tokens) - 1


def tokenize(documents: Sequence[Document], tokenizer: Tokenizer) -> TokenStream:
    """The stream of `documents` in their order, in the smallest dtypes that hold it."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    end, no_bytes = np.array([tokenizer.end_id], dtype), np.zeros(1, np.uint8)
    tokens, num_bytes, starts, position = [], [], [], 0
    for document in documents:
        ids, lengths = tokenizer.encode_with_lengths(document.text)
        tokens += [end, ids.astype(dtype)]
        num_bytes += [no_bytes, lengths.astype(np.min_scalar_type(lengths.max(initial=0)))]
        starts.append(position)
        position += 1 + len(ids)
    return TokenStream(
        tokens=np.concatenate([*tokens, end]),
        num_bytes=np.concatenate([*num_bytes, no_bytes]),
        starts=np.array(starts, np.int64),
        end_id=tokenizer.end_id,
    )


class Windows:
    """Training examples: `seq_len` inputs and the tokens after them, at stride `seq_len`; each a function of its index.

    The last window is padded, never dropped. Nothing is copied until a window is asked for.
    """

    def __init__(self, stream: TokenStream, seq_len: int):
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return -(-self.stream.num_targets // self.seq_len)

    def __getitem__(self, index: int) -> Window:
        """Window `index`, arrays of length `seq_len`.

        tokens, targets: int32, `end_id` on padding;
        segment_ids: int32, 1, 2, ... per document in the window, 0 on padding;
        positions: int32, 0, 1, ... from the start of each document or of the window;
        loss_weight: float32, 1 where there is a target, 0 on padding;
        target_bytes: int32, bytes of text that the target stands for.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        stream, begin = self.stream, int(index) * self.seq_len
        length = min(self.seq_len, stream.num_targets - begin)
        first, end = np.searchsorted(stream.starts, [begin, begin + length - 1], side="right")
        # The document at `begin` is number `first - 1`; those up to `end` start inside the window.
        starts = stream.starts[first:end] - begin
        new_document = np.zeros(length, np.int32)
        new_document[starts] = 1
        time = np.arange(length, dtype=np.int32)
        window = self.padding()
        window["tokens"][:length] = stream.tokens[begin : begin + length]
        window["targets"][:length] = stream.tokens[begin + 1 : begin + 1 + length]
        window["target_bytes"][:length] = stream.num_bytes[begin + 1 : begin + 1 + length]
        window["segment_ids"][:length] = 1 + np.cumsum(new_document)
        window["positions"][:length] = time - np.maximum.accumulate(time * new_document)
        window["loss_weight"][:length] = 1
        return window

    def padding(self) -> Window:
        """A window of padding only."""
        names = ("tokens", "targets", "segment_ids", "positions", "target_bytes")
        window = {name: np.zeros(self.seq_len, np.int32) for name in names}
        window["tokens"][:] = window["targets"][:] = self.stream.end_id
        return window | {"loss_weight": np.zeros(self.seq_len, np.float32)}
