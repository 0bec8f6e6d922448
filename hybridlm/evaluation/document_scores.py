"""Every target of every document scored once, whatever the windows.

Letters: n targets of a document, b batch, t time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from hybridlm.evaluation import windows
from hybridlm.evaluation.scoring import Rows, Scorer, bucket
from hybridlm.evaluation.texts import Text
from hybridlm.evaluation.windows import Mode, Window


@dataclass(frozen=True)
class DocumentScores:
    """Of the targets of one document."""

    nats: Float[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    """Of the input in its window; of carried windows, in the document."""
    begin: Int[np.ndarray, " n"]
    """The first input of the document that the model had seen when it predicted the target."""

    @classmethod
    def empty(cls, num: int) -> "DocumentScores":
        return cls(np.zeros(num, np.float32), np.zeros(num, bool), np.zeros(num, np.int64), np.zeros(num, np.int64))


def score_documents(scorer: Scorer, texts: Sequence[Text], mode: Mode, stride: int | None) -> list[DocumentScores]:
    """In the order of `texts`. Raises ConfigError where no document is as long as the mode needs."""
    lengths = [text.num_targets for text in texts]
    windows.check_long_enough(mode, scorer.context, lengths)
    scores = [DocumentScores.empty(length) for length in lengths]
    match mode:
        case "packed":
            score_windows(scorer, texts, list(windows.packed(lengths, scorer.context)), scores)
        case "separate":
            score_windows(scorer, texts, list(windows.separate(lengths, scorer.context)), scores)
        case "sliding":
            assert stride is not None  # windows.check
            score_windows(scorer, texts, list(windows.sliding(lengths, scorer.context, stride)), scores)
        case "carried":
            _score_carried(scorer, texts, scores)
    return scores


def score_windows(scorer: Scorer, texts: Sequence[Text], cut: list[Window], scores: Sequence[DocumentScores]) -> None:
    """Write the targets that count in the windows `cut` into `scores`."""

    def size(window: Window) -> int:
        return sum(piece.end - piece.begin for piece in window)

    cut = sorted(cut, key=size, reverse=True)  # rows of one batch are alike in length
    for first in range(0, len(cut), scorer.num_rows):
        batch = cut[first : first + scorer.num_rows]
        rows = Rows.padding(scorer.num_rows, min(bucket(size(batch[0])), scorer.context))
        for row, window in enumerate(batch):
            at = 0
            for number, piece in enumerate(window, 1):
                after, tokens = at + piece.end - piece.begin, texts[piece.document].tokens
                rows.tokens[row, at:after] = tokens[piece.begin : piece.end]
                rows.targets[row, at:after] = tokens[piece.begin + 1 : piece.end + 1]
                rows.segment_ids[row, at:after] = number
                at = after
        nats, greedy = map(np.asarray, scorer.alone(rows))
        for row, window in enumerate(batch):
            at = 0
            for piece in window:
                of, counted = scores[piece.document], slice(piece.counted, piece.end)
                places = slice(at + piece.counted - piece.begin, at + piece.end - piece.begin)
                of.nats[counted], of.greedy[counted] = nats[row, places], greedy[row, places]
                of.position[counted] = np.arange(places.start, places.stop)
                of.begin[counted] = piece.begin
                at += piece.end - piece.begin


def _score_carried(scorer: Scorer, texts: Sequence[Text], scores: Sequence[DocumentScores]) -> None:
    """Documents of like lengths side by side, window after window from the state behind the one before."""
    by_length = sorted(range(len(texts)), key=lambda i: -texts[i].num_targets)
    for first in range(0, len(texts), scorer.num_rows):
        batch = by_length[first : first + scorer.num_rows]
        longest = texts[batch[0]].num_targets
        size = min(scorer.context, bucket(longest))
        # Only full attention keeps more for a longer one; a power of two, so that few states are compiled.
        state = scorer.init_state(1 << (max(longest, size) - 1).bit_length())
        for begin in range(0, longest, size):
            rows = Rows.padding(scorer.num_rows, size)
            for row, document in enumerate(batch):
                tokens = texts[document].tokens[begin : begin + size + 1]
                num = max(len(tokens) - 1, 0)
                rows.tokens[row, :num], rows.targets[row, :num] = tokens[:-1], tokens[1:]
                rows.segment_ids[row, :num] = 1
            done, state = scorer.carried(rows, state)
            nats, greedy = map(np.asarray, done)
            for row, document in enumerate(batch):
                part, of = slice(begin, min(begin + size, texts[document].num_targets)), scores[document]
                num = max(part.stop - begin, 0)
                of.nats[part], of.greedy[part] = nats[row, :num], greedy[row, :num]
                of.position[part] = np.arange(begin, begin + num)
