"""`--task recall`: real text split into tokens that could be recalled from the context, and the others.

Zoology (Arora et al., 2023, arXiv:2312.04927, section 3): "AR hits" are the last tokens of bigrams that occurred
earlier in the context, without those bigrams that are common in the training text, which a model knows by heart. The
gap between models with and without attention is mostly on them. Of bytes, bigrams say little; `--ngram 8` is a word.

Letters: n targets of a document.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt64

from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import load_corpus
from hybridlm.data.packing import Stream
from hybridlm.evaluation import windows
from hybridlm.evaluation.document_scores import score_documents
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.text_losses import LARGEST_EXPONENT, texts_of

SLICES = ("other", "recall", "common")
READ_TOKENS = 2**22
"""Of the training text at a time."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: neighbouring ids end up far apart


def recall(scorer: Scorer, options: Options) -> dict[str, Any]:
    """Loss, perplexity, share of the tokens and share of greedy hits of each slice.

    `recall`: n-grams that occurred in the context; with `--rare`, `common` are those of them that the training text
    holds more often than that.
    """
    windows.check(options.windows, scorer.context, options.stride)
    texts = texts_of(scorer, options)
    if max(text.num_targets for text in texts) < options.ngram:
        raise ConfigError("--ngram", f"={options.ngram}: no document has so many tokens; give a smaller one")
    scores = score_documents(scorer, texts, options.windows, options.stride)
    codes = [ngram_codes(text.tokens, options.ngram) for text in texts]
    slices = [
        repeats(code, score.begin, options.ngram).astype(np.int64) for code, score in zip(codes, scores, strict=True)
    ]
    if options.rare is not None:
        # Target i ends the n-gram number i + 2 - size.
        ended = [which[options.ngram - 2 :] for which in slices]
        wanted = np.unique(np.concatenate([code[which > 0] for code, which in zip(codes, ended, strict=True)]))
        counts = counts_in(training_streams(scorer), wanted, options.ngram)
        common = wanted[counts > options.rare]
        for code, which in zip(codes, ended, strict=True):
            which *= 1 + np.isin(code, common)
    which = np.concatenate(slices)
    nats, greedy = (np.concatenate([getattr(score, name) for score in scores]) for name in ("nats", "greedy"))
    report: dict[str, Any] = {"windows": options.windows, "context": scorer.context, "ngram": options.ngram}
    if options.rare is not None:
        report["rare"] = options.rare
    for number, name in enumerate(SLICES):
        chosen = which == number
        count = int(chosen.sum())
        report[f"{name}_tokens"] = count
        if count:
            loss = float(np.mean(nats[chosen], dtype=np.float64))
            report |= {
                f"{name}_share": count / len(which),
                f"{name}_loss": loss,
                f"{name}_perplexity": math.exp(min(loss, LARGEST_EXPONENT)),
                f"{name}_acc": float(np.mean(greedy[chosen])),
            }
    report["loss"] = float(np.mean(nats, dtype=np.float64))
    return report


def ngram_codes(tokens: Integer[np.ndarray, " _"], size: int) -> UInt64[np.ndarray, " _"]:
    """A number for every n-gram, the one that ends at token `size` - 1 first; equal ones have equal numbers, and
    different ones others but for a chance of 2^-64 for two of them."""
    ids = tokens.astype(np.uint64) + np.uint64(1)
    count = max(len(tokens) - size + 1, 0)
    codes = np.zeros(count, np.uint64)
    for place in range(size):
        codes = (codes ^ ids[place : place + count]) * MULTIPLIER
        codes ^= codes >> np.uint64(29)
    return codes


def repeats(codes: UInt64[np.ndarray, " _"], begin: Int[np.ndarray, " n"], size: int) -> Bool[np.ndarray, " n"]:
    """For each target, whether the n-gram of `size` >= 2 that it ends has occurred from input `begin` of it on."""
    order = np.argsort(codes, kind="stable")
    before = np.full(len(codes), -1, np.int64)
    same = codes[order[1:]] == codes[order[:-1]]
    before[order[1:][same]] = order[:-1][same]
    hits = np.zeros(len(begin), bool)
    hits[size - 2 :] = before >= begin[size - 2 :]
    return hits


def training_streams(scorer: Scorer) -> tuple[Stream, ...]:
    """Of the run's config, which must be there still."""
    return tuple(stream for part in load_corpus(scorer.cfg.data).parts for stream in part.train)


def counts_in(streams: Sequence[Stream], wanted: UInt64[np.ndarray, " k"], size: int) -> Int[np.ndarray, " k"]:
    """How often each of the ascending `wanted` n-grams is in the streams."""
    counts = np.zeros(len(wanted), np.int64)
    if not len(wanted):
        return counts
    for tokens in chunks(streams, size):
        codes = ngram_codes(tokens, size)
        places = np.minimum(np.searchsorted(wanted, codes), len(wanted) - 1)
        counts += np.bincount(places[wanted[places] == codes], minlength=len(wanted))
    return counts


def chunks(streams: Sequence[Stream], size: int) -> Iterator[Int[np.ndarray, " _"]]:
    """The tokens of the streams, each chunk beginning with the last `size` - 1 of the one before."""
    for stream in streams:
        for first in range(0, stream.num_targets + 1, READ_TOKENS):
            tokens, _, _ = stream.read(max(first - size + 1, 0), min(first + READ_TOKENS, stream.num_targets + 1))
            yield tokens.astype(np.int64)
