"""The training step of a config compiled for devices that need not be there: the one that `hybridlm train` compiles.

Nothing of it is a model of the step. No corpus is read and no array is made: state and batch are abstract.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import jax
from hybridlm_kernels.bench.hlo import Program

from hybridlm.compiler_options import compiler_options
from hybridlm.config import Config
from hybridlm.exit_codes import EXIT_INTERRUPTED
from hybridlm.plan.dump import Dump, compile_and_dump
from hybridlm.plan.topology import Topology
from hybridlm.sharding import make_mesh
from hybridlm.train.program import StepProgram, own_options_as_config_errors, step_program

T = TypeVar("T")


@dataclass(frozen=True)
class CompiledStep:
    """A step, what was made of it, and how long that took."""

    config: Config
    topology: Topology
    step: StepProgram
    lowered: jax.stages.Lowered
    dump: Dump
    trace_seconds: float
    compile_seconds: float

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.step.mesh

    @cached_property
    def program(self) -> Program:
        """As it runs on each device."""
        return Program(self.dump.hlo)


def compile_step(config: Config, topology: Topology) -> CompiledStep:
    """Compile the step of `config` for `topology`. A step too large for its devices' memory is one, without executable.

    Raises ConfigError where the config does not fit the devices, or the compiler for them is not installed.
    """
    return interruptible(lambda: _compile_step(config, topology))


def _compile_step(config: Config, topology: Topology) -> CompiledStep:
    mesh = mesh_on(config, topology)
    started = time.monotonic()
    with jax.set_mesh(mesh):
        step = step_program(config, mesh)
        lowered = step.lower()
        traced = time.monotonic()
        own = config.sharding.xla_options
        with own_options_as_config_errors(own):
            dump = compile_and_dump(lowered, compiler_options(topology.chip.platform, own))
    done = time.monotonic()
    return CompiledStep(config, topology, step, lowered, dump, traced - started, done - traced)


def mesh_on(config: Config, topology: Topology) -> jax.sharding.Mesh:
    """The config's mesh of these devices. Raises ConfigError where its axes cannot be laid over them."""
    return make_mesh(topology.mesh_of(config), topology.devices())


def interruptible(f: Callable[[], T]) -> T:
    """`f()`, which Ctrl-C leaves at once: the compiler itself does not listen for minutes."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(f())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        thread.join()
    except KeyboardInterrupt:
        # Not by the interpreter's own end, which a compiler that is still at work can hold up.
        os.write(2, b"hybridlm: interrupted, not saved\n")
        os._exit(EXIT_INTERRUPTED)
    if errors:
        raise errors[0]
    return results[0]
