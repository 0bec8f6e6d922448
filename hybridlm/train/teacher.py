"""The teacher of a run: found and checked before anything is written, read frozen, laid out like any parameters."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hybridlm import config_io
from hybridlm.config import Config, Distill
from hybridlm.config_check import ConfigError
from hybridlm.data.tokenizers import load_tokenizer
from hybridlm.flops import forward_flops, training_flops
from hybridlm.model import Params, build
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.distill import Distillation
from hybridlm.train.steps import complete_steps


class Teacher(NamedTuple):
    """What a step needs of it."""

    distillation: Distillation
    params: Params
    """Abstract, with shardings."""


def with_teacher_step(config: Config, directory: Path) -> Config:
    """`config` with the teacher's checkpoint named: that of the run at `directory` where it has begun, else the latest.

    So a run that is resumed has the teacher that it began with, even if that has been trained on since. Raises
    ConfigError where there is no such teacher, or it reads other tokens than the student.
    """
    if config.distill is None:
        return config
    cfg = config.distill
    teacher = teacher_config(config, cfg)
    if Path(cfg.teacher).resolve() == directory.resolve():
        raise ConfigError("distill.teacher", f"={cfg.teacher}: is the run's own directory; choose another --out")
    steps = complete_steps(Path(cfg.teacher) / "checkpoints")
    if cfg.teacher_step is None and steps:
        begun_with = _begun_with(directory, cfg)
        cfg = replace(cfg, teacher_step=steps[-1] if begun_with is None else begun_with)
    if cfg.teacher_step not in steps:
        which = "no checkpoint" if cfg.teacher_step is None else f"no checkpoint of step {cfg.teacher_step}"
        there = f"there are those of {', '.join(map(str, steps))}" if steps else "train it first"
        raise ConfigError("distill.teacher", f"={cfg.teacher}: holds {which}; {there}")
    _check_tokens(config, teacher)
    return replace(config, distill=cfg)


def _begun_with(directory: Path, cfg: Distill) -> int | None:
    """The teacher's step of the run that is there already; None where there is none, or it has another teacher."""
    saved = directory / "config.json"
    before = (
        config_io.load_json(saved).distill if saved.exists() and complete_steps(directory / "checkpoints") else None
    )
    return before.teacher_step if before is not None and before.teacher == cfg.teacher else None


def teacher_config(config: Config, cfg: Distill) -> Config:
    """Of the teacher's run."""
    try:
        return config_io.load_run_config(cfg.teacher)
    except ConfigError as error:
        raise ConfigError("distill.teacher", f"={error}") from None


def _check_tokens(config: Config, teacher: Config) -> None:
    mine, theirs = config.model.vocab_size, teacher.model.vocab_size
    if mine != theirs:
        raise ConfigError("model.vocab_size", f"={mine}: the teacher has {theirs}; take the same")
    mine, theirs = config.data.tokenizer, teacher.data.tokenizer
    if mine != theirs and load_tokenizer(mine).fingerprint != load_tokenizer(theirs).fingerprint:
        raise ConfigError("data.tokenizer", f"={mine}: the teacher was trained with {theirs}; take the same")


def find_teacher(config: Config, mesh: jax.sharding.Mesh) -> Teacher | None:
    """The teacher of `config` on `mesh`, which is in scope; None where it has none.

    Raises ConfigError where there is no such teacher, it reads other tokens than the student, or batches are sampled
    and the mesh cuts their time.
    """
    cfg = config.distill
    if cfg is None:
        return None
    if cfg.on_policy and mesh.shape["context"] > 1:
        raise ConfigError(
            "distill.on_policy", f"={cfg.on_policy}: sampling needs whole sequences; set sharding.mesh.context=1"
        )
    teacher, tokenizer = teacher_config(config, cfg), load_tokenizer(config.data.tokenizer)
    _check_tokens(config, teacher)
    init, bind = build(teacher.model, config.kernels)
    distillation = Distillation(cfg, bind, tokenizer.vocab_size, tokenizer.end_id, config.train.seed)
    return Teacher(distillation, abstract_state(lambda: init(jax.random.key(0)), mesh))


def read_teacher(config: Config, params: Any) -> Params:
    """The teacher's parameters, laid out like the abstract `params`."""
    assert config.distill is not None
    teacher = teacher_config(config, config.distill)
    directory = Path(config.distill.teacher) / "checkpoints"
    with Checkpoints(directory, teacher.model, teacher.checkpoint) as checkpoints:
        return checkpoints.restore_params(params, config.distill.teacher_step)


def step_flops(config: Config) -> int:
    """FLOPs per token of training, as `training_flops` counts them; of distillation with the teacher's forward pass,
    and the student's for the share of steps where it samples."""
    length = config.data.seq_len
    flops = training_flops(config.model, length)
    if config.distill is None:
        return flops
    teacher = teacher_config(config, config.distill)
    sampling = round(config.distill.on_policy * forward_flops(config.model, length))
    return flops + forward_flops(teacher.model, length) + sampling
