"""`hybridlm eval`: a run's latest checkpoint on held-out text, beside two baselines on the same bytes."""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import config
from hybridlm.data.pipeline import evaluation_batches, load_corpus, load_whole
from hybridlm.model import build
from hybridlm.sharding import check_batch, make_mesh, spec
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.held_out import evaluate, make_eval_step


def evaluate_run(cfg: config.Config, run_dir: Path, *, data_spec: str | None) -> dict[str, Any]:
    """Evaluate on the run's held-out text, or on all of the text at `data_spec`; prints and returns the numbers.

    The mesh is `cfg.sharding.mesh`, which need not be the one the run was trained on.
    """
    corpus = load_corpus(cfg.data) if data_spec is None else load_whole(data_from_spec(cfg.data, data_spec))
    mesh = make_mesh(cfg.sharding.mesh)
    check_batch(cfg.train, mesh)
    init, bind = build(cfg.model, cfg.kernels)
    with jax.set_mesh(mesh), Checkpoints(run_dir / "checkpoints", cfg.checkpoint.keep) as checkpoints:
        params = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        rows = jax.NamedSharding(mesh, spec("batch"))
        batches = evaluation_batches(corpus.validation, batch_size=cfg.train.batch_size, sharding=rows, limit=None)
        report = {"step": checkpoints.latest_step()} | evaluate(make_eval_step(bind), params, batches)
    report |= baselines(corpus.validation_bytes())
    print(f"data             {corpus.description}")
    print(table(report))
    return report


def data_from_spec(data: config.Data, spec: str) -> config.Data:
    """The text that `--data` names: `python-stdlib`, a .jsonl file (or .jsonl.gz), or text files."""
    if spec == "python-stdlib":
        return replace(data, source="python-stdlib", path=None)
    source = "jsonl" if spec.endswith((".jsonl", ".jsonl.gz")) else "text"
    return replace(data, source=source, path=spec)


def table(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        f"checkpoint       step {report['step']}",
        f"tokens           {report['tokens']:,} ({report['bytes']:,} bytes)",
        f"loss             {report['loss']:.4f} nats per token",
        f"perplexity       {report['perplexity']:.4f}",
        f"bits per byte    {report['bits_per_byte']:.4f}",
        f"  gzip -9        {report['gzip_bits_per_byte']:.4f} on the same bytes",
        f"  single bytes   {report['order0_bits_per_byte']:.4f} (order-0 entropy)",
        "loss by position " + "  ".join(f"{first}-{end - 1}: {loss:.3f}" for first, end, loss in report["by_position"]),
    ]
    if report.get("moe_dropped"):
        lines.append(f"dropped          {report['moe_dropped']:.2%} of the choices of experts; raise buffer_factor")
    return "\n".join(lines)


def baselines(text: bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9`, and the entropy of single bytes (order 0), of `text`."""
    counts = np.bincount(np.frombuffer(text, np.uint8), minlength=256)
    share = counts[counts > 0] / len(text)
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "order0_bits_per_byte": float(-(share * np.log2(share)).sum()),
    }
