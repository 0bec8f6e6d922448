"""`hybridlm finetune`: a run that begins with the parameters of another."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.distributed import is_first
from hybridlm.finetune.adapters import base_of
from hybridlm.finetune.beginning import beginning
from hybridlm.finetune.paths import by_path
from hybridlm.finetune.selection import trained_part
from hybridlm.model import Params
from hybridlm.train import directory as run_directory
from hybridlm.train.derived import read_params
from hybridlm.train.loop import train
from hybridlm.train.program import StepProgram
from hybridlm.train.step import TrainState
from hybridlm.train.steps import complete_steps

COMMAND = "finetune"


def check_is_run(path: Path) -> None:
    """Raise ConfigError where `path` holds a model of another library, or nothing to begin with."""
    if is_published(path):
        problem = f": is a Hugging Face directory; `hybridlm import {path} --out RUN` makes a run of it"
        raise ConfigError(f"--init-from {path}", problem)


def is_published(path: Path) -> bool:
    """Whether `path` is a directory of a Hugging Face model, by its config.json."""
    try:
        said = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False  # as an unreadable config of a run, which its reader tells
    return isinstance(said, dict) and bool({"architectures", "model_type"} & said.keys())


def finetune_run(config: Config, source: Path, directory: Path) -> int:
    """Train `config` at `directory` from the parameters of the run at `source` on, or go on with what is there.

    Returns an exit code. Raises ConfigError where the user's input is wrong.
    """
    check_is_run(source)
    begun = run_directory.origin_of(directory)
    if complete_steps(directory / "checkpoints") and (begun or {}).get("run") != str(source):
        whose = "that began at random parameters" if begun is None else f"that began with {begun['run']}"
        raise ConfigError(f"--out {directory}", f": holds a run {whose}; choose another --out")
    return train(config, directory, start=partial(start, config, source, directory))


def start(config: Config, source: Path, directory: Path, program: StepProgram) -> TrainState:
    """The state before the first step; says what it is made of, and writes that into the directory."""
    source_config = config_io.load_run_config(source)
    params, _ = read_params(source, source_config)
    abstract = base_of(program.state.params)
    begun = beginning(abstract, config.model, params, source_config.model, config.finetune, config.train.seed)
    state = jax.jit(program.state_from, donate_argnums=0)(_on_mesh(begun.params, abstract, program))
    step = max(complete_steps(source / "checkpoints"))
    if is_first():
        run_directory.write_origin(directory, {"command": COMMAND, "run": str(source), "step": step})
        print(f"begins with the parameters of step {step} of {source}")
        if begun.fresh:
            print(f"drawn anew: {', '.join(begun.fresh)}")
        if begun.num_new_words:
            print(f"new words: {begun.num_new_words:,}, each near the mean of the others")
        print(f"trains {_size(trained_part(config.finetune, state.params)):,} of {_size(state.params):,} parameters")
    return state


def _on_mesh(params: Params, abstract: Params, program: StepProgram) -> Params:
    """Arrays laid out as those of the state, drawn by the run's seed where there are none."""
    leaves = by_path(params)

    def missing() -> dict[str, Any]:
        drawn = by_path(base_of(program.make_state().params))
        return {path: x for path, x in drawn.items() if path not in leaves}

    drawn = jax.jit(missing)() if len(leaves) < len(jax.tree.leaves(abstract)) else {}

    def laid_out(path: tuple[Any, ...], like: Any) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name in drawn:
            return drawn[name]
        # Unlike device_put, which compares the whole arrays of all processes with each other.
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: leaves[name][index])

    return jax.tree_util.tree_map_with_path(laid_out, abstract)


def _size(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
