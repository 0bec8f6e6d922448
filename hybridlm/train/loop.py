"""A training run, top to bottom."""

import contextlib
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.data.pipeline import Batches, Corpus, evaluation_batches, load_corpus
from hybridlm.flops import idle_parameters
from hybridlm.model import build
from hybridlm.optim import make_optimizer
from hybridlm.sharding import check_batch, make_mesh, spec
from hybridlm.train import directory as run_directory
from hybridlm.train.capacity import check_fits
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.clock import StepClock
from hybridlm.train.held_out import evaluate, make_eval_step
from hybridlm.train.metrics import RunLog
from hybridlm.train.preemption import EXIT_STOPPED, StopRequest
from hybridlm.train.step import Metrics, init_state, make_train_step


def train(config: Config, directory: Path, *, fresh: bool = False) -> int:
    """Train until `config.train.steps`, going on from the latest checkpoint in `directory`. Returns an exit code.

    Raises ConfigError where the user's input is wrong, before anything is compiled or written over.
    """
    with StopRequest() as stop:
        mesh = make_mesh(config.sharding.mesh)
        check_batch(config.train, mesh)
        make_optimizer(config.optimizer, config.train.steps)
        run_directory.prepare(config, directory, fresh=fresh)
        corpus = load_corpus(config.data)
        check_vocabulary(config, corpus)
        with jax.set_mesh(mesh), Checkpoints(directory / "checkpoints", config.checkpoint.keep) as checkpoints:
            return _run(config, directory, mesh, corpus, checkpoints, stop)


def _run(
    config: Config,
    directory: Path,
    mesh: jax.sharding.Mesh,
    corpus: Corpus,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> int:
    total, batch_size = config.train.steps, config.train.batch_size
    init, bind = build(config.model, config.kernels)
    optimizer, schedule = make_optimizer(config.optimizer, total)
    tables = config.optimizer.tables
    make_state = partial(init_state, init, optimizer, config.train.seed, tables)
    abstract = abstract_state(make_state, mesh)
    check_fits(abstract, mesh)
    rows = jax.NamedSharding(mesh, spec("batch"))
    batches = Batches(
        corpus.train, batch_size=batch_size, seed=config.train.seed, sharding=rows, prefetch=config.data.prefetch
    )
    if checkpoints.latest_step() is None:
        state = jax.jit(make_state)()
    else:
        state, data = checkpoints.restore(abstract)
        if data["corpus"] != corpus.fingerprint:
            raise ConfigError("data", f": {directory} was trained on other text or with another tokenizer")
        batches.set_state(data["batches"])
    if jax.process_index() == 0:
        # Not before the checkpoint was found to fit: a run that is refused stays as it was.
        config_io.dump_json(config, directory / "config.json")
    step = first_step = int(state.step)

    def evaluate_held_out() -> dict[str, Any]:
        limit = config.eval.batches
        held_out = evaluation_batches(corpus.validation, batch_size=batch_size, sharding=rows, limit=limit)
        return evaluate(eval_step, state.params, held_out, state.step)

    def save() -> None:
        data = {"corpus": corpus.fingerprint, "batches": batches.state()}
        checkpoints.save(step, state, data, config_io.to_dict(config))

    with RunLog(directory, first_step, total) as log, contextlib.closing(batches):
        log.say(describe(config, mesh, corpus, state.params, directory))
        if first_step:
            log.say(f"resumed from step {first_step}")
        if first_step >= total:
            log.say(f"finished already: step {first_step} of {total}; a larger --train.steps goes on from there")
        eval_step = make_eval_step(bind)
        train_step = make_train_step(bind, optimizer, schedule, config.train, tables)
        if first_step < total:
            started = time.monotonic()
            train_step = train_step.lower(state, abstract_batch(corpus, batch_size, rows)).compile()
            log.say(f"compiled the training step in {time.monotonic() - started:.1f} s")
        clock = StepClock(config, first_step)
        pending: tuple[int, Metrics] | None = None  # metrics of a step that may still be running

        def write_pending() -> None:
            nonlocal pending
            if pending is not None:
                (logged, metrics), pending = pending, None
                values = {name: value.tolist() for name, value in jax.device_get(metrics).items()}
                tokens = logged * batch_size * config.data.seq_len
                log.train({"step": logged, "tokens": tokens} | values | clock.lap(logged))
                check_finite(logged, values, config.train.max_nonfinite_steps)

        while True:
            if (step == total or (step and step % config.eval.every == 0)) and not log.evaluated(step):
                write_pending()
                with clock.paused():
                    log.eval({"step": step} | evaluate_held_out())
            if step >= total:
                break
            state, metrics = train_step(state, next(batches))
            step += 1
            write_pending()  # of the step before, while the device is busy with this one
            clock.limit_run_ahead(metrics)
            if step % config.train.log_every == 0 or step == total:
                pending = step, metrics
            stopping = stop.at(step)
            if stopping or step % config.checkpoint.every == 0 or step == total:
                write_pending()
                with clock.paused():
                    save()
            if stopping and step < total:
                checkpoints.wait()
                log.say(f"stopped at step {step} of {total}, saved; the same command goes on from there")
                return EXIT_STOPPED
        checkpoints.wait()
        log.say(f"done: {total} steps; everything is in {directory}")
    return 0


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """Raise ConfigError where the tokenizer knows more tokens than the model."""
    needed = corpus.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ConfigError(
            "model.vocab_size",
            f"={config.model.vocab_size}: data.tokenizer={config.data.tokenizer!r} has {needed} tokens; raise it",
        )


def check_finite(step: int, values: dict[str, Any], limit: int) -> None:
    """Raise FloatingPointError after `limit` rejected steps in a row."""
    if values["nonfinite_in_a_row"] >= limit:
        raise FloatingPointError(
            f"step {step}: loss or gradient was not finite {values['nonfinite_in_a_row']} times in a row (none of them "
            "changed the parameters); lower optimizer.peak_lr or clip_norm and go on from the latest checkpoint"
        )


def abstract_batch(corpus: Corpus, batch_size: int, rows: jax.NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch, to compile for before there is one."""
    return {
        name: jax.ShapeDtypeStruct((batch_size, *x.shape), x.dtype, sharding=rows)
        for name, x in corpus.train.padding().items()
    }


def describe(config: Config, mesh: jax.sharding.Mesh, corpus: Corpus, params: Any, directory: Path) -> str:
    """What a person wants to know before a run starts."""
    devices = jax.devices()
    parts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in params.items()}
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    tokens = config.train.batch_size * config.data.seq_len
    total, idle = sum(parts.values()), idle_parameters(config.model)
    active = f", {total - idle:,} of them active per token" if idle else ""
    return "\n".join(
        (
            f"devices     {len(devices)} x {devices[0].device_kind}, mesh {axes}, {jax.process_count()} process(es)",
            f"parameters  {total:,} (" + ", ".join(f"{name} {n:,}" for name, n in parts.items()) + f"){active}",
            f"data        {corpus.description}",
            f"steps       {config.train.steps:,} of {tokens:,} tokens, {config.train.steps * tokens:,} in all",
            f"directory   {directory}",
        )
    )
