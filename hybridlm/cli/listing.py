"""Commands that say what there is: `show`, `kernels`, `list`."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from hybridlm import config_io
from hybridlm.config import FFN, Mixer, Optimizer, Schedule
from hybridlm.config_check import ConfigError
from hybridlm.config_tasks import task_rows


def show(args: argparse.Namespace, overrides: list[str]) -> int:
    config = config_io.override(config_io.load_config(args.config), overrides)
    if args.json:
        print(json.dumps(config_io.to_dict(config), indent=2))
    else:
        for line in outline(config, ""):
            print(line)
    return 0


def outline(value: Any, path: str) -> Iterator[str]:
    """`path=value` of every field, and `path: Class` above the fields of what may be of several classes."""
    parts = config_io.children(value)
    if parts is None or parts == {}:
        yield f"{path}={config_io.as_text(value)}"
        return
    if isinstance(value, Mixer | FFN | Optimizer | Schedule):
        yield f"{path}: {type(value).__name__}"
    for name, part in parts.items():
        yield from outline(part, config_io.join(path, name))


def kernels(args: argparse.Namespace, overrides: list[str]) -> int:
    if args.config is None and overrides:
        raise ConfigError(
            overrides[0], ": name the config whose fields are meant, as in `hybridlm kernels griffin_tiny`"
        )
    config = None if args.config is None else config_io.override(config_io.load_config(args.config), overrides)

    from hybridlm.plan.kernels import kernels_at, kernels_of
    from hybridlm.plan.topology import topology

    where = None if args.topology is None else topology(args.topology)
    rows = kernels_at(where) if config is None else kernels_of(config, where)
    width = max((12, *(len(row.choice.op) for row in rows)))
    for row in rows:
        print(f"{row.choice.op:{width}} {row.phase:7} {row.choice.impl:10}  {'; '.join(row.choice.reasons)}")
        print(f"{'':{width}} {' '.join(row.operands)}")
    if not rows:
        print("this model calls no kernel operation")
    return 0


def list_names(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm list` has no config to set fields of")
    if args.what == "configs":
        rows = [(name, summary) for name, summary, _ in config_io.list_recipes()]
    elif args.what == "tasks":
        from hybridlm.evaluation.tasks import TASKS

        rows = [*((name, task.summary) for name, task in TASKS.items()), *task_rows()]
    else:
        rows = [(cls.__name__, (cls.__doc__ or "").partition("\n")[0]) for cls in registered(args.what)]
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:{width}}  {summary}")
    return 0


def registered(what: str) -> list[type]:
    """The config classes that something is registered for."""
    from hybridlm.ffns import FFNS
    from hybridlm.ffns.moe.gates import GATES
    from hybridlm.ffns.moe.routers import ROUTERS
    from hybridlm.mixers import MIXERS
    from hybridlm.optim import OPTIMIZERS

    entries = {"mixers": MIXERS, "ffns": FFNS, "routers": ROUTERS, "gates": GATES}
    return list(OPTIMIZERS if what == "optimizers" else entries[what].entries)
