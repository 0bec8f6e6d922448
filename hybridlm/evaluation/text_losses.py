"""`--task perplexity`: per token, byte and word on documents in any windows, by domain and by position.

Letters: n targets of a document.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybridlm.evaluation import windows
from hybridlm.evaluation.bootstrap import intervals
from hybridlm.evaluation.document_scores import DocumentScores, score_documents
from hybridlm.evaluation.options import Options
from hybridlm.evaluation.scoring import Scorer
from hybridlm.evaluation.texts import Text, data_from_spec, read_texts
from hybridlm.train.held_out import position_buckets

LARGEST_EXPONENT = 700.0
"""exp of more is no float64."""
SHOWN_DOMAINS = 20


def texts_of(scorer: Scorer, options: Options) -> list[Text]:
    """The held-out documents of the run, or all of those at `options.data`."""
    data = scorer.cfg.data if options.data is None else data_from_spec(scorer.cfg.data, options.data)
    return read_texts(data, scorer.tokenizer, whole=options.data is not None, domain_field=options.domain_field)


def text_losses(scorer: Scorer, options: Options) -> dict[str, Any]:
    """The numbers of `metrics_of`; where asked for, `by_domain` and the intervals of `--bootstrap`."""
    windows.check(options.windows, scorer.context, options.stride)
    texts = texts_of(scorer, options)
    scores = score_documents(scorer, texts, options.windows, options.stride)
    sums = sums_of(texts, scores)
    report: dict[str, Any] = {"windows": options.windows, "context": scorer.context}
    if options.stride is not None:
        report["stride"] = options.stride
    report |= totals(sums) | {"documents": len(texts)}
    if options.bootstrap is not None:
        report |= intervals(sums, metrics_of, num=options.bootstrap, seed=options.seed)
    report["by_position"] = by_position(scores)
    if options.by_file or options.domain_field is not None:
        report["by_domain"] = by_domain(texts, sums)
    return report


def sums_of(texts: Sequence[Text], scores: Sequence[DocumentScores]) -> dict[str, np.ndarray]:
    """`nats`, `tokens`, `bytes` and `words` of every document, float64."""
    return {
        "nats": np.array([np.sum(score.nats, dtype=np.float64) for score in scores]),
        "tokens": np.array([text.num_targets for text in texts], np.float64),
        "bytes": np.array([text.num_bytes for text in texts], np.float64),
        "words": np.array([text.num_words for text in texts], np.float64),
    }


def metrics_of(sums: Mapping[str, float]) -> dict[str, float]:
    """`loss` in nats per token, `perplexity` and `word_perplexity`, `bits_per_byte` and `bits_per_word`.

    Those of bytes and words divide all nats, the ends of documents included, by the bytes or words of the text.
    """
    nats = sums["nats"]
    metrics = {
        "loss": nats / sums["tokens"],
        "perplexity": math.exp(min(nats / sums["tokens"], LARGEST_EXPONENT)),
        "bits_per_byte": nats / math.log(2) / sums["bytes"],
    }
    if sums["words"]:
        metrics["bits_per_word"] = nats / math.log(2) / sums["words"]
        metrics["word_perplexity"] = math.exp(min(nats / sums["words"], LARGEST_EXPONENT))
    return metrics


def totals(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    added = {name: float(values.sum()) for name, values in sums.items()}
    return metrics_of(added) | {name: int(added[name]) for name in ("tokens", "bytes", "words")}


def by_position(scores: Sequence[DocumentScores]) -> list[tuple[int, int, float]]:
    """Mean loss over positions [0, 16), [16, 32), [32, 64), ... (`first, end, loss`)."""
    size = 1 + max(int(score.position.max()) for score in scores)
    nats, counts = np.zeros(size), np.zeros(size)
    for score in scores:
        nats += np.bincount(score.position, score.nats, size)
        counts += np.bincount(score.position, minlength=size)
    return position_buckets(nats, counts)


def by_domain(texts: Sequence[Text], sums: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The numbers of each domain, that of most tokens first."""
    domains = np.array([text.domain for text in texts])
    rows = []
    for domain in np.unique(domains):
        chosen = domains == domain
        of_domain = totals({name: values[chosen] for name, values in sums.items()})
        rows.append({"domain": str(domain), "documents": int(chosen.sum())} | of_domain)
    return sorted(rows, key=lambda row: -row["tokens"])


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """The report for people."""

    def interval(name: str) -> str:
        low, high = (report.get(f"{name}_{end}") for end in ("low", "high"))
        return "" if low is None or high is None else f"   [{low:.4f}, {high:.4f}]"

    stride = f", stride {report['stride']}" if "stride" in report else ""
    lines = [
        f"windows          {report['windows']} of {report['context']} tokens{stride}",
        f"tokens           {report['tokens']:,} ({report['bytes']:,} bytes, {report['words']:,} words, "
        f"{report['documents']:,} documents)",
        f"loss             {report['loss']:.4f} nats per token{interval('loss')}",
        f"perplexity       {report['perplexity']:.4f}{interval('perplexity')}",
        f"bits per byte    {report['bits_per_byte']:.4f}{interval('bits_per_byte')}",
    ]
    if "bits_per_word" in report:
        lines.append(f"bits per word    {report['bits_per_word']:.4f}{interval('bits_per_word')}")
    positions = "  ".join(f"{first}-{end - 1}: {loss:.3f}" for first, end, loss in report["by_position"])
    lines.append(f"loss by position {positions}")
    if "by_domain" in report:
        rows = report["by_domain"]
        width = max(len("domain"), *(len(row["domain"]) for row in rows[:SHOWN_DOMAINS]))
        lines.append(f"{'domain':{width}}  documents      tokens    loss  bits per byte")
        lines += [
            f"{row['domain']:{width}}  {row['documents']:9,}  {row['tokens']:10,}  {row['loss']:6.4f}  "
            f"{row['bits_per_byte']:13.4f}"
            for row in rows[:SHOWN_DOMAINS]
        ]
        if len(rows) > SHOWN_DOMAINS:
            lines.append(f"... and {len(rows) - SHOWN_DOMAINS:,} more; --json has all")
    return lines
