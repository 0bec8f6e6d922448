"""Training of memories' tables: the rows that a step reads are updated in place, and no gradient of a table is made.

Tables are no part of what is differentiated. A layer adds zeros, its tap, to what a table answers; the tap's gradient
is the answer's, and with what the layer asked for, which it records, makes that of the rows that were read.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.ffns.base import RECORDED
from hybridlm.ffns.memory.table import Read
from hybridlm.finetune.selection import is_trained
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.table_optim import init_rows, learning_rate, update_rows

TableStates = dict[str, Any]
"""What the optimizer keeps of the rows of each table, by the tables' names."""


class Asked(NamedTuple):
    """What the layers of one batch asked of their tables, and the gradients of the answers, by part and block."""

    recorded: Any
    answers: Any
    leading_axes: int
    """1 where microbatches are stacked, else 0."""


def tables_of(params: Params) -> dict[str, Any]:
    """The tables among the parameters, by name."""
    return {name: of_module["table"] for name, of_module in params.get("shared", {}).items() if "table" in of_module}


def without_tables(params: Params) -> Params:
    return with_tables(params, dict.fromkeys(tables_of(params)))


def with_tables(params: Params, tables: dict[str, Any]) -> Params:
    """`params` with these tables in their places."""
    if not tables:
        return params
    return params | {"shared": params["shared"] | {name: {"table": table} for name, table in tables.items()}}


def are_tables_trained(selection: config.Finetune, params: Params) -> bool:
    """Whether steps record what is read of the tables among `params` and update them; also where there are none.

    Raises ConfigError where some are trained and others are not.
    """
    trained = {name: is_trained(selection, f"shared.{name}.table") for name in tables_of(params)}
    if len(set(trained.values())) > 1:
        frozen = ", ".join(f"shared.{name}.table" for name, is_one in trained.items() if not is_one)
        raise ConfigError("finetune", f": trains some of the memories' tables but not {frozen}; train all or none")
    return all(trained.values())


def init_tables(cfg: config.TableOptimizer | None, params: Params) -> TableStates:
    """What `cfg` keeps of the tables among `params`. Raises ConfigError where there are some and no `cfg`."""
    return {name: init_rows(_rule(cfg), table) for name, table in tables_of(params).items()}


def update_tables(
    cfg: config.TableOptimizer | None,
    lm: LM,
    states: TableStates,
    asked: Asked,
    *,
    train: config.Train,
    lr: Float[Array, ""] | float,
    step: Int[Array, ""],
    tokens: Float[Array, ""],
    finite: Bool[Array, ""],
) -> tuple[dict[str, Array], TableStates, dict[str, Array]]:
    """New tables and states, and metrics as vectors over tables. Nothing changes unless `finite`.

    `lr` is the rate of the other parameters, `step` the number of updates before this one; the gradients, which `asked`
    has as sums over tokens, are divided by `tokens`.
    """
    tables, new_states = {}, {}
    metrics: dict[str, list[Array]] = {}
    for i, (name, reads) in enumerate(_by_table(asked).items()):
        rule = _rule(cfg)
        told = {
            "lr": jnp.asarray(learning_rate(rule, lr, step, train.steps)),
            "step": step,
            "scale": 1 / tokens,
            "key": jax.random.fold_in(jax.random.key(train.seed), i),
        }
        change = partial(update_rows, rule)
        tables[name], new_states[name], used = lm.shared[name].updated(change, states[name], reads, finite, told)
        for metric, value in used.items():
            metrics.setdefault(metric, []).append(value)
    return tables, new_states, {name: jnp.concatenate(values) for name, values in metrics.items()}


def _rule(cfg: config.TableOptimizer | None) -> config.TableOptimizer:
    if cfg is None:
        raise ConfigError("optimizer", ": has no rule for the memories' tables; give its config a field `tables`")
    return cfg


def all_finite(asked: Asked) -> Bool[Array, ""]:
    """Whether the gradients of all answers are."""
    return jnp.stack([jnp.ones((), bool), *(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(asked.answers))]).all()


def _by_table(asked: Asked) -> dict[str, list[Read]]:
    """The reads of all layers by table, the batch as the first axis."""
    reads: dict[str, list[Read]] = {}
    for part, records in asked.recorded.items():
        for record, answers in zip(records, asked.answers[part], strict=True):
            for name, answer in (answers or {}).items():
                # Asked for with weights, the answer is the vectors, and the other way round.
                read = [record.get(f"{RECORDED}{name}/{what}", answer) for what in Read._fields]
                # Behind the batch's axis: repeats of the pattern, and microbatches.
                before = asked.leading_axes + (part == "repeats")
                reads.setdefault(name, []).append(Read(*(jnp.moveaxis(x, before, 0) for x in read)))
    return reads
