"""`hybridlm experts`: which experts of a run's latest checkpoint the tokens of held-out text go to."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import load_corpus, load_whole
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.evaluation.texts import data_from_spec
from hybridlm.model import build
from hybridlm.model.expert_usage import count_choices, layers_with_experts, shares
from hybridlm.sharding import check_batch, spec
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.mesh_choice import run_mesh

HOTTEST = 5
"""As many are named in a layer's line."""


def usage_of_run(cfg: config.Config, run_dir: Path, *, data_spec: str | None, batches: int | None) -> dict[str, Any]:
    """Count on `batches` batches (all where it is None) of the run's held-out text, or of the text at `data_spec`.

    Prints and returns the numbers. Raises ConfigError where the run has no experts.
    """
    if not layers_with_experts(cfg.model):
        raise ConfigError(str(run_dir), ": no layer of this run has experts")
    corpus = load_corpus(cfg.data) if data_spec is None else load_whole(data_from_spec(cfg.data, data_spec))
    mesh = run_mesh(cfg)
    check_batch(cfg, mesh)
    init, bind = build(cfg.model, cfg.kernels)
    size = cfg.train.batch_size
    with jax.set_mesh(mesh), Checkpoints(run_dir / "checkpoints", cfg.model, cfg.checkpoint) as checkpoints:
        params = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        rows = jax.NamedSharding(mesh, spec("sequences", "time"))
        held_out = evaluation_batches(corpus.validation, batch_size=size, sharding=rows, limit=batches)
        counts = count_choices(bind, params, held_out, cfg.model)
        report = {
            "step": checkpoints.latest_step(),
            "layers": [{"layer": layer} | of_layer(row) for layer, row in counts.items()],
        }
    print(f"data     {corpus.description}")
    print(table(report))
    return report


def of_layer(counts: Int[np.ndarray, " x"]) -> dict[str, Any]:
    """A layer's numbers: `choices` of all tokens, each expert's `share`, their `entropy` over that of even shares (1
    where all experts get as much), and the `max_load` over the mean."""
    share = shares(counts)
    used = share[share > 0]
    return {
        "choices": int(counts.sum()),
        "share": share.tolist(),
        "entropy": float(-(used * np.log(used)).sum() / np.log(max(len(counts), 2))),
        "max_load": float(share.max() * len(counts)),
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    return "\n".join([f"step     {report['step']}", *map(line, report["layers"])])


def line(layer: dict[str, Any]) -> str:
    share = np.asarray(layer["share"])
    order = np.argsort(-share, kind="stable")
    hottest = "  ".join(f"{expert}: {share[expert]:.1%}" for expert in order[:HOTTEST])
    return (
        f"layer {layer['layer']:<3} hottest {hottest}   coldest {order[-1]}: {share[order[-1]]:.1%}   "
        f"entropy {layer['entropy']:.3f}   max/mean {layer['max_load']:.2f}"
    )
