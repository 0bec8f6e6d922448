"""A training run, top to bottom."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.data.corpus import Corpus, load_corpus
from hybridlm.data.pipeline import Batches, evaluation_batches
from hybridlm.distributed import agreed, is_first
from hybridlm.exit_codes import EXIT_DIVERGED, EXIT_DONE, EXIT_STOPPED
from hybridlm.flops import idle_parameters
from hybridlm.optim import make_optimizer
from hybridlm.sharding import check_batch, mesh_text
from hybridlm.train import directory as run_directory
from hybridlm.train.capacity import check_fits
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.executable import load_executable
from hybridlm.train.fingerprint import diverged_replicas
from hybridlm.train.goodput import Goodput
from hybridlm.train.held_out import evaluate, make_eval_step
from hybridlm.train.journal import Journal
from hybridlm.train.mesh_choice import run_mesh
from hybridlm.train.metrics import Events, NoLog, RunLog
from hybridlm.train.preemption import StopRequest
from hybridlm.train.program import StepProgram, compile_step, step_program
from hybridlm.train.rejection import TooManyRejected
from hybridlm.train.rollback import Rollbacks
from hybridlm.train.samples import Samples
from hybridlm.train.step import Metrics, TrainState
from hybridlm.train.steps import set_aside_incomplete
from hybridlm.train.teacher import read_teacher, with_teacher_step
from hybridlm.train.watchdog import FIRST_WAITS_SECONDS, Watchdog

Start = Callable[[StepProgram], TrainState]
"""Makes the state before the first step, on the mesh in scope."""


def train(
    config: Config,
    directory: Path,
    *,
    fresh: bool = False,
    executable: Path | None = None,
    start: Start | None = None,
) -> int:
    """Train until `config.train.steps`, going on from the latest checkpoint in `directory`. Returns an exit code.

    The step is compiled, or read from `executable`, which `hybridlm plan --save` wrote. Where there is no checkpoint,
    the state is that of `start`, or without it one with random parameters.

    Raises ConfigError where the user's input is wrong, before anything is compiled or written over.
    """
    with StopRequest() as stop:
        goodput = Goodput(directory / "goodput.json" if is_first() else None)
        mesh = run_mesh(config)
        check_batch(config, mesh)
        make_optimizer(config.optimizer, config.train.steps)
        config = with_teacher_step(config, directory)
        leads = jax.process_count() > 1 and is_first()
        watchdog = Watchdog(config.train.hang_seconds, longer=FIRST_WAITS_SECONDS if leads else 0.0)
        with run_directory.claimed(directory), watchdog:
            run_directory.prepare(config, directory, fresh=fresh)
            if start is None:
                run_directory.check_has_begun(directory)
            corpus = load_corpus(config.data)
            check_vocabulary(config, corpus)
            set_aside_incomplete(directory / "checkpoints")
            checkpoints = Checkpoints(directory / "checkpoints", config.model, config.checkpoint)
            with jax.set_mesh(mesh), checkpoints, goodput:
                run = Run(config, directory, mesh, corpus, checkpoints, stop, goodput, watchdog, executable, start)
                with contextlib.closing(run.batches):
                    return run.finish()


class Run:
    """What stays in this process while the state goes on and, now and then, back."""

    def __init__(
        self,
        config: Config,
        directory: Path,
        mesh: jax.sharding.Mesh,
        corpus: Corpus,
        checkpoints: Checkpoints,
        stop: StopRequest,
        goodput: Goodput,
        watchdog: Watchdog,
        executable: Path | None,
        start: Start | None,
    ):
        self.config, self.directory, self.mesh, self.corpus = config, directory, mesh, corpus
        self.checkpoints, self.stop, self.goodput, self.watchdog = checkpoints, stop, goodput, watchdog
        self.executable, self.start = executable, start or first_state_of
        self.program = step_program(config, mesh)
        check_fits(self.program.state, mesh)
        self.frozen = tuple(read_teacher(config, params) for params in self.program.frozen)
        # Before anything is written: an executable of another step is refused.
        self.train_step = None if executable is None else load_executable(executable, self.program.lower(), mesh)
        self.eval_step, self.eval_compiled = make_eval_step(self.program.bind), False
        self.samples, self.samples_compiled = Samples(config, mesh, self.program.bind, corpus.tokenizer), False
        self.batches = Batches(
            corpus.train,
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            sharding=self.program.rows,
            prefetch=config.data.prefetch,
            workers=config.data.workers,
        )
        self.beginning = self.batches.state()
        self.events = Events(directory if is_first() else None)
        self.rollbacks = Rollbacks(config.train.rollbacks, self.events)

    def finish(self) -> int:
        """Train to the end, going back as often as allowed. Returns an exit code."""
        news: str | None = None
        while True:
            try:
                return self.go_on(news)
            except TooManyRejected as rejected:
                with self.watchdog.off():
                    self.checkpoints.wait()
                news = self.rollbacks.note(rejected, back_to=self.checkpoints.latest_step() or 0)

    def restored(self) -> TrainState:
        """The state of the latest checkpoint, or that before the first step; the data stand where it does."""
        with self.watchdog.off(), self.goodput.spent("restore"):
            if self.checkpoints.latest_step() is None:
                state, position = self.start(self.program), self.beginning
            else:
                state, data = self.checkpoints.restore(self.program.state)
                for step, damage in self.checkpoints.set_aside:
                    self.events.add("quarantined", step, reason=damage)
                self.checkpoints.set_aside.clear()
                if data["corpus"] != self.corpus.fingerprint:
                    raise ConfigError("data", f": {self.directory} was trained on other text or with another tokenizer")
                position = data["batches"]
            self.batches.set_state(position)
            self.rollbacks.jump(self.batches)
            return jax.block_until_ready(state)

    def go_on(self, news: str | None) -> int:
        """Steps from the latest checkpoint on to the last. Returns an exit code.

        Raises TooManyRejected where these steps have to be gone back over.
        """
        config, total = self.config, self.config.train.steps
        state = self.restored()
        step = first_step = int(state.step)
        if is_first():
            # Not before the checkpoint was found to fit: a run that is refused stays as it was.
            config_io.dump_json(config, self.directory / "config.json")
            run_directory.record_model(self.directory, config, self.mesh, state.params)
        with RunLog(self.directory, first_step, total) if is_first() else NoLog() as log:
            # Once for all: what the first process reads another could read too late, after the next line was written.
            evaluated = agreed(log.evaluated(first_step))
            sampled = agreed(log.sampled(first_step, config.eval.sample_prompts))
            epochs = self.batches.epochs(total)
            log.say(news or describe(config, self.mesh, self.corpus, epochs, state.params, self.directory))
            if news is None:
                self.events.add("restored" if first_step else "started", first_step)
                self.announce(log, first_step)
            if first_step < total:
                self.prepare_step(log)
            journal = Journal(config, first_step, log, self.events, self.goodput, self.checkpoints)
            before: Metrics | None = None
            save_due = False
            while True:
                if is_due(step, config.eval.every, total):
                    journal.write()
                    with journal.clock.paused():
                        if not (evaluated and step == first_step):
                            log.eval({"step": step} | self.evaluate(state))
                        if not (sampled and step == first_step):
                            log.samples(step, self.sample(step, state))
                if step >= total:
                    break
                assert self.train_step is not None
                self.watchdog.alive()
                self.goodput.step(step + 1)
                batch, waited = self.next_batch(before)
                state, metrics = self.train_step(state, batch, *self.frozen)
                before = metrics
                step += 1
                journal.write()  # of the step before, while the device is busy with this one
                journal.clock.limit_run_ahead(metrics)
                journal.dispatched(step, metrics, self.batches, waited)
                stopping = self.stop.at(step)
                save_due |= stopping or is_due(step, config.checkpoint.every, total)
                if save_due or is_due(step, config.train.compare_replicas_every, total):
                    try:
                        accepted = journal.settle(step)
                    except TooManyRejected:
                        if not stopping:
                            raise
                        accepted = False  # whoever goes on goes back: there is no time for it now
                    if (code := self.compare_replicas(step, state)) is not None:
                        return code
                    # Not among rejected steps: it is from before them that the run may have to go on.
                    if save_due and (accepted or step == total):
                        with journal.clock.paused():
                            self.save(step, state)
                        save_due = False
                if stopping and step < total:
                    return self.stopped(step, log, journal)
            self.wait_for_saves(journal)
            log.say(f"done: {total} steps; everything is in {self.directory}")
            if first_step < total:
                log.say(self.goodput.text())
        return EXIT_DONE

    def announce(self, log: RunLog | NoLog, first_step: int) -> None:
        total = self.config.train.steps
        if first_step:
            log.say(f"resumed from step {first_step}")
        if first_step >= total:
            log.say(f"finished already: step {first_step} of {total}; a larger --train.steps goes on from there")

    def prepare_step(self, log: RunLog | NoLog) -> None:
        """Compile the training step, unless it is there already."""
        if self.train_step is None:
            started = time.monotonic()
            with self.watchdog.off(), self.goodput.spent("compile"):
                self.train_step = compile_step(self.program.lower(), self.mesh, self.config)
            log.say(f"compiled the training step in {time.monotonic() - started:.1f} s")
        elif self.executable is not None:
            log.say(f"the training step is that of {self.executable}")

    def next_batch(self, before: Metrics | None) -> tuple[dict[str, jax.Array], float]:
        """The next batch, and the seconds for which the device had nothing to do while it was waited for.

        `before` are the metrics of the last step: where that is still running, nothing was lost.
        """
        started = time.monotonic()
        batch = next(self.batches)
        last: Any = None if before is None else before["loss"]
        if last is not None and not last.is_ready():
            return batch, 0.0
        waited = time.monotonic() - started
        self.goodput.move(waited, "data")
        return batch, waited

    def evaluate(self, state: TrainState) -> dict[str, Any]:
        """Losses on held-out text."""
        limit, batch_size = self.config.eval.batches, self.config.train.batch_size
        with self.goodput.spent("evaluation"):
            held_out = evaluation_batches(
                self.corpus.validation, batch_size=batch_size, sharding=self.program.rows, limit=limit
            )
            watched = self.watchdog.watched(held_out, compiled=self.eval_compiled)
            values = evaluate(self.eval_step, state.params, watched, state.step)
            self.eval_compiled = True
            return values

    def sample(self, step: int, state: TrainState) -> list[dict[str, Any]]:
        """What the run's prompts go on with."""
        with self.goodput.spent("evaluation"):
            if self.samples_compiled:
                self.watchdog.alive()
            else:
                self.watchdog.disarm()
            found = self.samples(state.params, step)
            self.watchdog.disarm()
            self.samples_compiled = True
            return found

    def compare_replicas(self, step: int, state: TrainState) -> int | None:
        """An exit code where two devices hold different copies of an array of the state, if that is asked for."""
        if self.config.train.compare_replicas_every is None:
            return None
        with self.goodput.spent("compare"):
            names = diverged_replicas(state)
        if not names:
            return None
        self.events.add("diverged", step, arrays=names)
        if is_first():
            print(f"hybridlm: step {step}: the devices' copies of {', '.join(names)} differ", file=sys.stderr)
        return EXIT_DIVERGED

    def save(self, step: int, state: TrainState) -> None:
        data = {"corpus": self.corpus.fingerprint, "batches": self.batches.state()}
        with self.watchdog.off(), self.goodput.spent("save"):
            self.checkpoints.save(step, state, data, config_io.to_dict(self.config))

    def stopped(self, step: int, log: RunLog | NoLog, journal: Journal) -> int:
        self.wait_for_saves(journal)
        saved = self.checkpoints.latest_step() or 0
        how = "saved" if saved == step else f"not saved among rejected steps, but at step {saved}"
        self.events.add("stopped", step, reason="request")
        log.say(f"stopped at step {step} of {self.config.train.steps}, {how}; the same command goes on from there")
        return EXIT_STOPPED

    def wait_for_saves(self, journal: Journal) -> None:
        with self.watchdog.off(), self.goodput.spent("save"):
            self.checkpoints.wait()
        journal.saved()


def first_state_of(program: StepProgram) -> TrainState:
    """That of random parameters."""
    return jax.jit(program.make_state)()


def is_due(step: int, every: int | None, total: int) -> bool:
    """Whether something that is done every so many steps, and after the last, is done after `step`."""
    return every is not None and step > 0 and (step == total or step % every == 0)


def check_vocabulary(config: Config, corpus: Corpus) -> None:
    """Raise ConfigError where the tokenizer knows more tokens than the model."""
    needed = corpus.tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ConfigError(
            "model.vocab_size",
            f"={config.model.vocab_size}: data.tokenizer={config.data.tokenizer!r} has {needed} tokens; raise it",
        )


def describe(
    config: Config, mesh: jax.sharding.Mesh, corpus: Corpus, epochs: Mapping[str, float], params: Any, directory: Path
) -> str:
    """What a person wants to know before a run starts."""
    devices = jax.devices()
    parts = {name: sum(math.prod(x.shape) for x in jax.tree.leaves(part)) for name, part in params.items()}
    axes, tokens = mesh_text(mesh.shape), config.train.batch_size * config.data.seq_len
    total, idle = sum(parts.values()), idle_parameters(config.model)
    active = f", {total - idle:,} of them active per token" if idle else ""
    return "\n".join(
        (
            f"devices     {len(devices)} x {devices[0].device_kind}, mesh {axes}, {jax.process_count()} process(es)",
            f"parameters  {total:,} (" + ", ".join(f"{name} {n:,}" for name, n in parts.items()) + f"){active}",
            f"data        {corpus.description}",
            f"steps       {config.train.steps:,} of {tokens:,} tokens, {config.train.steps * tokens:,} in all",
            "epochs      " + ", ".join(f"{name} {n:.3g}" for name, n in epochs.items()),
            f"directory   {directory}",
        )
    )
