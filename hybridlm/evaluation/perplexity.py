"""`hybridlm eval`: a run's latest checkpoint on held-out text, beside two baselines on the same bytes."""

import gzip
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import config
from hybridlm.data.corpus import load_corpus, load_whole
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.evaluation.texts import data_from_spec
from hybridlm.model import build
from hybridlm.sharding import check_batch, spec
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.held_out import evaluate, make_eval_step
from hybridlm.train.mesh_choice import run_mesh


def evaluate_run(cfg: config.Config, run_dir: Path, *, data_spec: str | None) -> dict[str, Any]:
    """Evaluate on the run's held-out text, or on all of the text at `data_spec`; prints and returns the numbers.

    The mesh is `cfg.sharding.mesh`, which need not be the one the run was trained on.
    """
    corpus = load_corpus(cfg.data) if data_spec is None else load_whole(data_from_spec(cfg.data, data_spec))
    mesh = run_mesh(cfg)
    check_batch(cfg, mesh)
    init, bind = build(cfg.model, cfg.kernels)
    with jax.set_mesh(mesh), Checkpoints(run_dir / "checkpoints", cfg.model, cfg.checkpoint) as checkpoints:
        params = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        rows = jax.NamedSharding(mesh, spec("sequences", "time"))
        batches = evaluation_batches(corpus.validation, batch_size=cfg.train.batch_size, sharding=rows, limit=None)
        report = {"step": checkpoints.latest_step()} | evaluate(make_eval_step(bind), params, batches)
    report |= baselines(corpus.validation_bytes())
    print(f"data             {corpus.description}")
    print(table(report))
    return report


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
