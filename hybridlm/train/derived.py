"""Runs made from other runs: parameters read to the host, and a new run directory written at step 0."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybridlm import config_io
from hybridlm.config import Config, Distill
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import Corpus, load_corpus
from hybridlm.data.pipeline import Batches
from hybridlm.distributed import agreed, is_first, together
from hybridlm.finetune.adapters import base_of
from hybridlm.model import Params, build
from hybridlm.model.by_layer import drawn
from hybridlm.model.linearize import linearize, linearized_model
from hybridlm.model.prune import prune, pruned_model
from hybridlm.model.upcycle import check_pair, same_function, upcycle
from hybridlm.optim import make_optimizer
from hybridlm.sharding import check_batch
from hybridlm.train import directory as run_directory
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.loop import check_vocabulary
from hybridlm.train.mesh_choice import run_mesh
from hybridlm.train.program import step_program


def read_params(run_dir: Path, config: Config) -> tuple[Params, int]:
    """The latest parameters of a run as NumPy arrays, none of them put on a device, and their step."""
    with Checkpoints(run_dir / "checkpoints", config.model, config.checkpoint) as checkpoints:
        params = checkpoints.restore_params(abstract_params(config))
        step = checkpoints.latest_step()
    assert step is not None
    return params, step


def abstract_params(config: Config) -> Params:
    """NumPy arrays in place of parameters, which ask for NumPy arrays and take no memory."""
    init, _ = build(config.model, config.kernels)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


def upcycle_run(config: Config, run_dir: Path, directory: Path, *, mask_fraction: float) -> None:
    """`hybridlm upcycle`: a run of `config` at `directory` that begins where the dense run at `run_dir` is.

    Raises ConfigError where the user's input is wrong, before anything is written.
    """
    check_free(directory)
    dense = config_io.load_run_config(run_dir)
    try:
        check_pair(dense.model, config.model)
    except ConfigError as error:
        raise error.under("model") from None
    mesh, corpus = prepared(config)
    params, step = read_params(run_dir, dense)
    key = jax.random.key(config.train.seed)
    params = upcycle(params, dense.model, config.model, key, mask_fraction=mask_fraction)
    same = same_function(dense.model, config.model) and not mask_fraction
    origin = {"command": "upcycle", "run": str(run_dir), "step": step, "mask_fraction": mask_fraction}
    write_run(config, directory, params, corpus, mesh, origin)
    print(f"{directory}: upcycled from step {step} of {run_dir}, {'the same function' if same else 'a start near it'}")


def prune_run(config: Config, run_dir: Path, directory: Path, *, keep: int, since: Path | None) -> None:
    """`hybridlm prune`: a run at `directory` with fewer experts than that of `config` at `run_dir`.

    Their routers' norms are compared with those of the run at `since`, or where it is None with those that the run
    began with. Raises ConfigError where the user's input is wrong, before anything is written.
    """
    check_free(directory)
    try:
        config_after = replace(config, model=pruned_model(config.model, keep))
    except ConfigError as error:
        raise error.under("model") from None
    if since is None and run_directory.origin_of(run_dir) is not None:
        raise ConfigError(
            str(run_dir), ": did not begin at random parameters; give --since a run of what it began with"
        )
    if since is not None and config_io.load_run_config(since).model != config.model:
        raise ConfigError(f"--since {since}", f": is a run of another model than {run_dir}")
    mesh, corpus = prepared(config_after)
    params, step = read_params(run_dir, config)
    if since is None:
        init, _ = build(config.model, config.kernels)
        start = drawn(init, jax.random.key(config.train.seed), ("router",))
    else:
        start, _ = read_params(since, config)
    params, _ = prune(params, start, config.model, keep)
    origin = {"command": "prune", "run": str(run_dir), "step": step, "since": None if since is None else str(since)}
    write_run(config_after, directory, params, corpus, mesh, origin)
    print(f"{directory}: {keep} experts per layer, from step {step} of {run_dir}")


def linearize_run(
    config: Config,
    run_dir: Path,
    directory: Path,
    *,
    recurrence: str,
    window: int,
    keep_every: int | None,
    teach: bool = False,
) -> None:
    """`hybridlm linearize`: a run at `directory` like that of `config` at `run_dir`, with recurrences for attention.

    With `teach`, the latter is its teacher. Raises ConfigError where the input is wrong, before anything is written.
    """
    check_free(directory)
    trained = config_io.load_run_config(run_dir)
    if trained.model != config.model:
        raise ConfigError("model", ": is the run's; --mixer, --window and --keep-every say what becomes of it")
    model = linearized_model(config.model, recurrence=recurrence, window=window, keep_every=keep_every)
    config_after = replace(config, model=model)
    mesh, corpus = prepared(config_after)
    params, step = read_params(run_dir, trained)
    if teach:
        config_after = replace(config_after, distill=Distill(teacher=str(run_dir), teacher_step=step))
    origin = {"command": "linearize", "run": str(run_dir), "step": step}
    write_run(config_after, directory, linearize(params, config.model, model), corpus, mesh, origin)
    changed = sum(a != b for a, b in zip(config.model.blocks(), model.blocks(), strict=True))
    print(f"{directory}: {changed} of {model.num_layers} layers linearised, from step {step} of {run_dir}")


def prepared(config: Config) -> tuple[jax.sharding.Mesh, Corpus]:
    """The mesh and the text of a run. Raises ConfigError where it could not be trained."""
    mesh = run_mesh(config)
    check_batch(config, mesh)
    make_optimizer(config.optimizer, config.train.steps)
    corpus = load_corpus(config.data)
    check_vocabulary(config, corpus)
    return mesh, corpus


def check_free(directory: Path) -> None:
    """Raise ConfigError where `directory` cannot be made, or holds something already."""
    if directory.is_dir() and any(directory.iterdir()):
        raise ConfigError(f"--out {directory}", ": is there already and holds something; choose another --out")
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"--out {directory}", ": is a file; choose another --out")
    if (partial := partial_of(directory)).exists():
        raise ConfigError(str(partial), ": was left by a command that was cut short; remove it")
    above = next(parent for parent in directory.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"--out {directory}", f": cannot be written to: {above} is a file, or not writable")


def partial_of(directory: Path) -> Path:
    """Where what becomes `directory` is written."""
    return directory.with_name(directory.name + ".partial")


def write_run(
    config: Config,
    directory: Path,
    params: Params,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    origin: dict[str, Any],
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Write a run of `config` that is about to take its first step from `params`, with a fresh optimizer state.

    All processes must call; the first writes what is no checkpoint, and `add_files` may write more into the directory
    that it is given. The run is written beside `directory` and then renamed: after an error there is none, not half
    of one.
    """
    partial = partial_of(directory)
    _make_partial(partial, directory)
    try:
        with jax.set_mesh(mesh):
            program = step_program(config, mesh)
            params = jax.tree.map(
                lambda x, like: jax.device_put(x, like.sharding), params, base_of(program.state.params)
            )
            state = jax.jit(program.state_from, donate_argnums=0)(params)
            run_directory.prepare(config, partial, fresh=True)
            if is_first():
                config_io.dump_json(config, partial / "config.json")
                run_directory.write_origin(partial, origin)
                if add_files is not None:
                    add_files(partial)
            with Checkpoints(partial / "checkpoints", config.model, config.checkpoint) as checkpoints:
                data = {"corpus": corpus.fingerprint, "batches": first_position(config, corpus)}
                checkpoints.save(0, state, data, config_io.to_dict(config))
        together("the run is written")
        if is_first():
            os.replace(partial, directory)
        together("the run has its name")
    finally:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)


def _make_partial(partial: Path, directory: Path) -> None:
    """Of the first process, and all learn where it could not."""
    refusal = None
    if is_first():
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            refusal = ConfigError(f"--out {directory}", f": cannot be written to: {error.strerror}")
    if agreed(refusal is not None):
        raise refusal or ConfigError(f"--out {directory}", ": cannot be used, as the first process says")


def first_position(config: Config, corpus: Corpus) -> dict[str, Any]:
    """That of a run's first batch."""
    size, seed = config.train.batch_size, config.train.seed
    with closing(Batches(corpus.train, batch_size=size, seed=seed, sharding=None, prefetch=1)) as batches:
        return batches.state()
