"""`hybridlm eval` of a run on a synthetic task: how often its answers are right, by token and by sequence."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.pipeline import evaluation_batches
from hybridlm.data.synthetic.windows import windows_of_length
from hybridlm.distributed import is_first
from hybridlm.losses import token_losses
from hybridlm.mixers.base import Segments
from hybridlm.model import build
from hybridlm.model.lm import LM
from hybridlm.sharding import check_batch, constrain, spec
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.mesh_choice import run_mesh
from hybridlm.train.metrics import JsonLines

Batch = dict[str, Array]
AnswerStep = Callable[[Any, Batch], dict[str, Array]]


@dataclass(frozen=True)
class Cell:
    """One row of the report: held-out examples of a task, all of one length."""

    name: str
    task: config.Task
    length: int

    @property
    def settings(self) -> dict[str, Any]:
        """What it is about, in a record."""
        pairs = {"num_pairs": self.task.num_pairs} if isinstance(self.task, config.MQAR) else {}
        return {"task": self.name, "length": self.length} | pairs


def evaluate_task(
    cfg: config.Config, run_dir: Path, *, lengths: Sequence[int] = (), pairs: Sequence[int] = ()
) -> dict[str, Any]:
    """Evaluate a run's latest checkpoint on its task; prints, returns and adds to eval.jsonl the numbers.

    `lengths` are in the task's unit, the longest of training where there are none; `pairs` are of MQAR, those of
    training where there are none. Raises ConfigError where an example cannot be so.
    """
    rows = list(cells(cfg.data, lengths, pairs))
    mesh = run_mesh(cfg)
    for cell in rows:
        # How a batch is cut depends on its length, not on what it holds.
        check_batch(replace(cfg, data=config.Data(seq_len=cell.task.num_tokens(cell.length))), mesh)
    init, bind = build(cfg.model, cfg.kernels)
    with jax.set_mesh(mesh), Checkpoints(run_dir / "checkpoints", cfg.model, cfg.checkpoint) as checkpoints:
        params = checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
        step, run = checkpoints.latest_step(), make_answer_step(bind)
        sharding = jax.NamedSharding(mesh, spec("sequences", "time"))
        results = []
        for cell in rows:
            windows = windows_of_length(cell.task, cell.length)
            batches = evaluation_batches(windows, batch_size=cfg.train.batch_size, sharding=sharding, limit=None)
            results.append(cell.settings | accuracy(run, params, batches))
    if is_first():
        lines = JsonLines(run_dir / "eval.jsonl")
        for result in results:
            lines.append({"step": step} | result)
    report = {"step": step, "task": cfg.data.source, "unit": rows[0].task.unit, "results": results}
    print(table(report))
    return report


def cells(data: config.Data, lengths: Sequence[int], pairs: Sequence[int]) -> Iterator[Cell]:
    """One for each number of pairs and each length. Raises ConfigError where an example cannot be so."""
    task = data.task
    assert task is not None
    if pairs and not isinstance(task, config.MQAR):
        raise ConfigError("--pairs", f": are of mqar, and the run's task is {data.source}; leave it out")
    for variant in of_pairs(task, pairs) if isinstance(task, config.MQAR) else [task]:
        for length in lengths or [task.longest(data.seq_len)]:
            if length < variant.shortest:
                raise ConfigError("--length", f"={length}: {data.source} needs at least {variant.shortest}")
            yield Cell(data.source, variant, length)


def of_pairs(task: config.MQAR, pairs: Sequence[int]) -> list[config.MQAR]:
    """The task with each number of pairs; where there are none, with the fewest and the most of training."""
    numbers = pairs or sorted({task.min_pairs or task.num_pairs, task.num_pairs})
    try:
        return [replace(task, num_pairs=number, min_pairs=None) for number in numbers]
    except ConfigError as error:
        raise ConfigError("--pairs", f": {error.under('data.task')}") from None


def make_answer_step(bind: Callable[[Any], LM]) -> AnswerStep:
    """`run(params, batch)` -> sums over a batch: `answers`, those that are `right`, their loss in `nats`,
    `sequences` that have answers, and those that have no other than `right_sequences`.

    An answer is the id with the largest logit, among all ids of the model. The logits of a whole batch are held.
    """

    def run(params: Any, batch: Batch) -> dict[str, Array]:
        lm = bind(params)
        x, _, _ = lm.features(batch["tokens"], Segments(batch["segment_ids"], batch["positions"]))
        targets, weight = batch["targets"], batch["loss_weight"]
        nll, _ = token_losses(lm.head(), x, targets)
        best = constrain(jnp.argmax(lm.logits(x), axis=-1), "sequences", "time")
        right = (best == targets) * weight
        answers = jnp.sum(weight, axis=1)
        return {
            "answers": jnp.sum(answers),
            "right": jnp.sum(right),
            "nats": jnp.sum(nll * weight),
            "sequences": jnp.sum(answers > 0),
            "right_sequences": jnp.sum((answers > 0) & (jnp.sum(right, axis=1) == answers)),
        }

    return jax.jit(run)


def accuracy(run: AnswerStep, params: Any, batches: Iterable[Batch]) -> dict[str, Any]:
    """`accuracy` of answers, `sequence_accuracy`, `loss` in nats per answer, and how many `sequences` and `answers`."""
    total: dict[str, float] = {}
    for batch in batches:
        for name, value in jax.device_get(run(params, batch)).items():
            total[name] = total.get(name, 0.0) + float(value)
    return {
        "accuracy": total["right"] / total["answers"],
        "sequence_accuracy": total["right_sequences"] / total["sequences"],
        "loss": total["nats"] / total["answers"],
        "sequences": int(total["sequences"]),
        "answers": int(total["answers"]),
    }


def table(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    with_pairs = "num_pairs" in report["results"][0]
    lines = [
        f"checkpoint  step {report['step']}",
        f"task        {report['task']}, {report['results'][0]['sequences']:,} held-out examples of each length",
        f"{'pairs':>5}  " * with_pairs + f"{report['unit']:>7}  by token  by sequence    loss",
    ]
    for row in report["results"]:
        head = f"{row['num_pairs']:5}  " if with_pairs else ""
        lines.append(
            f"{head}{row['length']:7}  {row['accuracy']:8.3f}  {row['sequence_accuracy']:11.3f}  {row['loss']:6.3f}"
        )
    return "\n".join(lines)
