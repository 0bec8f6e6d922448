"""The program of a training step: what `hybridlm train` compiles and runs, and `hybridlm plan` compiles.

It is the same for devices that are there and for those that are not. Letters: b batch, t time.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from hybridlm.compiler_options import compiler_options
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.data.packing import FIELDS
from hybridlm.finetune.build import build_trained, with_new_adapters
from hybridlm.finetune.selection import check_selection
from hybridlm.model import Params
from hybridlm.model.lm import LM
from hybridlm.optim import make_optimizer
from hybridlm.sharding import check_batch, spec
from hybridlm.train.checkpoint import abstract_state
from hybridlm.train.step import TrainState, first_state, init_state, make_train_step
from hybridlm.train.teacher import find_teacher

OPTION_REFUSED = ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
"""What XLA says of an option whose name it does not know, and of one whose value is wrong."""


@dataclass(frozen=True)
class StepProgram:
    """A run's training step on one mesh, not compiled yet."""

    mesh: jax.sharding.Mesh
    bind: Callable[[Params], LM]
    make_state: Callable[[], TrainState]
    """The state before the first step; call it under jit."""
    state_from: Callable[[Params], TrainState]
    """That of given parameters, which have no adapters yet; likewise."""
    step: jax.stages.Wrapped
    state: Any
    """Abstract, with shardings."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Abstract: every field [b, t]."""
    rows: jax.NamedSharding
    """That of the batch."""
    frozen: tuple[Params, ...]
    """What the step takes beside them and leaves as it is, abstract: a teacher's parameters, or nothing."""

    def lower(self) -> jax.stages.Lowered:
        """Traced, and lowered to StableHLO."""
        return self.step.lower(self.state, self.batch, *self.frozen)


def step_program(config: Config, mesh: jax.sharding.Mesh) -> StepProgram:
    """The step of `config` on `mesh`, which has to be in scope (`jax.set_mesh`).

    Raises ConfigError where the model, the batch or the schedule do not fit the mesh or the number of steps.
    """
    check_batch(config, mesh)
    optimizer, schedule = make_optimizer(config.optimizer, config.train.steps)
    tables = config.optimizer.tables
    init, bind = build_trained(config)
    make_state = partial(init_state, init, optimizer, config.train.seed, tables, config.finetune)
    state = abstract_state(make_state, mesh)
    check_selection(config.finetune, state.params)
    rows = jax.NamedSharding(mesh, spec("sequences", "time"))
    shape = (config.train.batch_size, config.data.seq_len)
    teacher = find_teacher(config, mesh)
    distillation = None if teacher is None else teacher.distillation
    return StepProgram(
        mesh=mesh,
        bind=bind,
        make_state=make_state,
        state_from=lambda params: first_state(with_new_adapters(config, params), optimizer, tables, config.finetune),
        step=make_train_step(bind, optimizer, schedule, config.train, tables, distillation, config.finetune),
        state=state,
        batch={name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in FIELDS.items()},
        rows=rows,
        frozen=() if teacher is None else (teacher.params,),
    )


def compile_step(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, config: Config) -> jax.stages.Compiled:
    """With the options of the mesh's devices and the run's own. Raises ConfigError where XLA refuses one."""
    platform, own = mesh.devices.flat[0].platform, config.sharding.xla_options
    with own_options_as_config_errors(own):
        return lowered.compile(compiler_options=compiler_options(platform, own))


@contextlib.contextmanager
def own_options_as_config_errors(own: Sequence[str]) -> Iterator[None]:
    """XLA's refusal of a run's own options, in one line."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if own and str(error).startswith(OPTION_REFUSED):
            raise ConfigError("sharding.xla_options", f": {str(error).partition(chr(10))[0]}") from None
        raise
