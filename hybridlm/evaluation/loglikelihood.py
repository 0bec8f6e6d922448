"""Log-likelihoods of continuations: a context that several continuations share is read once.

Letters: t time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from hybridlm.data.tokenizers import Tokenizer
from hybridlm.evaluation.scoring import Rows, Scorer, bucket
from hybridlm.generate import PREFILL_CHUNK
from hybridlm.model.lm import LMState


class Request(NamedTuple):
    context: Int[np.ndarray, " t"]
    """At least one token: that before the continuation."""
    continuation: Int[np.ndarray, " _"]
    """At least one token."""


class Likelihood(NamedTuple):
    log_likelihood: float
    """Of all tokens of the continuation together, in nats."""
    greedy: bool
    """Whether each of them is the most likely one."""


def request(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Tokens of a document that begins with `context`.

    White space at the end of the context goes to the continuation, with whose first word most tokenizers join it; the
    continuation is what the tokens of both have beyond those of the context, as in lm-evaluation-harness.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    before = np.asarray(tokenizer.encode(stripped.encode()), np.int32)
    whole = np.asarray(tokenizer.encode((stripped + continuation).encode()), np.int32)
    before = before[: len(whole) - 1]  # where a tokenizer joins all of the continuation with what is before it
    return Request(np.concatenate([[tokenizer.begin_id], before]).astype(np.int32), whole[len(before) :])


def log_likelihoods(scorer: Scorer, requests: Sequence[Request]) -> list[Likelihood]:
    """In the order of `requests`. Contexts are never cut; those of like lengths are read side by side."""
    groups: dict[bytes, list[int]] = {}
    for index, (context, _) in enumerate(requests):
        groups.setdefault(context.tobytes(), []).append(index)
    ordered = sorted(groups.values(), key=lambda group: -len(requests[group[0]].context))
    found: list[Likelihood | None] = [None] * len(requests)
    for first in range(0, len(ordered), scorer.num_rows):
        batch = ordered[first : first + scorer.num_rows]
        longest = max(len(requests[i].context) + len(requests[i].continuation) for group in batch for i in group)
        contexts = [requests[group[0]].context for group in batch]
        state = read_contexts(scorer, [context[:-1] for context in contexts], length=longest)
        for place in range(max(map(len, batch))):
            asked = {row: group[place] for row, group in enumerate(batch) if place < len(group)}
            size = bucket(max(len(requests[i].continuation) for i in asked.values()))
            rows = Rows.padding(scorer.num_rows, size)
            for row, i in asked.items():
                continuation = requests[i].continuation
                num = len(continuation)
                rows.tokens[row, :num] = [contexts[row][-1], *continuation[:-1]]
                rows.targets[row, :num] = continuation
                rows.segment_ids[row, :num] = 1
            nats, greedy = map(np.asarray, scorer.after(rows, state))
            for row, i in asked.items():
                num = len(requests[i].continuation)
                total = float(np.sum(nats[row, :num], dtype=np.float64))
                found[i] = Likelihood(-total, bool(greedy[row, :num].all()))
    return [likelihood for likelihood in found if likelihood is not None]


def read_contexts(scorer: Scorer, contexts: Sequence[Int[np.ndarray, " _"]], *, length: int) -> LMState:
    """The state behind each, in a row of its own, with room for `length` tokens in all."""
    # Only full attention keeps more for a longer one; a power of two, so that few states are compiled.
    state = scorer.init_state(1 << (max(length, 16) - 1).bit_length())
    for first in range(0, max(map(len, contexts)), PREFILL_CHUNK):
        chunks = [context[first : first + PREFILL_CHUNK] for context in contexts]
        rows = Rows.padding(scorer.num_rows, min(bucket(max(map(len, chunks))), PREFILL_CHUNK))
        for row, chunk in enumerate(chunks):
            rows.tokens[row, : len(chunk)], rows.segment_ids[row, : len(chunk)] = chunk, 1
        state = scorer.advance(rows.tokens, rows.segment_ids, state)
    return state
