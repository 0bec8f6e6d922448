"""`--task lambada`: the last word of a passage (Paperno et al., 2016, arXiv:1606.06031), from JSON lines of `text`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybridlm.evaluation.bootstrap import intervals
from hybridlm.evaluation.loglikelihood import log_likelihoods, request
from hybridlm.evaluation.multiple_choice import read_twice
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.request_files import objects, refuse, text_field
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.text_losses import LARGEST_EXPONENT


def lambada(scorer: Scorer, options: Options) -> dict[str, Any]:
    """`acc`: all tokens of the word are greedy; `perplexity` per word: exp of its mean -log-likelihood."""
    assert options.file is not None  # tasks.check
    passages = read_passages(options.file)[: options.limit]
    requests = [
        request(scorer.tokenizer, read_twice(context) if options.read_twice else context, word)
        for context, word in passages
    ]
    found = log_likelihoods(scorer, requests)
    sums = {
        "acc": np.array([likelihood.greedy for likelihood in found], np.float64),
        "nats": np.array([-likelihood.log_likelihood for likelihood in found]),
        "passages": np.ones(len(found)),
    }
    report: dict[str, Any] = {"passages": len(found)}
    report |= metrics_of({name: float(values.sum()) for name, values in sums.items()})
    if options.bootstrap is not None:
        report |= intervals(sums, metrics_of, num=options.bootstrap, seed=options.seed)
    return report


def metrics_of(sums: Mapping[str, float]) -> dict[str, float]:
    return {
        "acc": sums["acc"] / sums["passages"],
        "perplexity": math.exp(min(sums["nats"] / sums["passages"], LARGEST_EXPONENT)),
    }


def read_passages(path: Path) -> list[tuple[str, str]]:
    """Each passage without its last word, and that word with the blank before it."""
    passages = []
    for number, record in objects(path):
        context, blank, word = text_field(path, number, record, "text").strip().rpartition(" ")
        if not blank:
            refuse(path, "text is a single word; a passage has a context before its last", number)
        passages.append((context, f" {word}"))
    return passages
