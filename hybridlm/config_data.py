"""Configs of the text that a run reads. Imports no JAX."""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from hybridlm.config_check import (
    ConfigError,
    Node,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    suggestion,
)
from hybridlm.config_tasks import TASKS, Task, TaskSource

TextSource = Literal["python-stdlib", "text", "jsonl", "chat", "prepared"]
Source = Literal[TextSource, TaskSource]


@dataclass(frozen=True, kw_only=True)
class Chat(Node):
    """How conversations of `source=chat` become text. Losses count what the assistant says, and nothing else."""

    template: Literal["chatml", "llama3", "gemma", "plain", "custom"] = "chatml"
    turn: str | None = None
    """Of `custom`: a message, with {role} and {content}, such as `<{role}>{content}</{role}>`."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What happens to conversations that are longer than `seq_len`."""

    def check(self) -> None:
        if self.template == "custom" and self.turn is None:
            raise ConfigError("turn", ": is required by template=custom, such as '<{role}>{content}</{role}>'")
        if self.template != "custom" and self.turn is not None:
            raise ConfigError("turn", f"={self.turn!r}: is of template=custom, and this is {self.template}")
        if self.turn is not None and any(self.turn.count(name) != 1 for name in ("{role}", "{content}")):
            raise ConfigError("turn", f"={self.turn!r}: must hold {{role}} and {{content}} once each")
        if self.turn is not None and self.turn.index("{role}") > self.turn.index("{content}"):
            raise ConfigError("turn", f"={self.turn!r}: {{role}} must come before {{content}}")


@dataclass(frozen=True, kw_only=True)
class Part(Node):
    """One source of a mixture."""

    name: str
    """In errors, logs and metrics; letters, digits, `_`, `-` and `.`."""
    source: TextSource = "text"
    path: str | None = None
    text_key: str = "text"
    weight: NonNegativeFloat = 1.0
    """Its share of the sequences is its weight over the sum of all."""

    def check(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ConfigError("name", f"={self.name!r}: must be of letters, digits, _, - and .")
        _check_path(self.source, self.path)


@dataclass(frozen=True, kw_only=True)
class Stage(Node):
    """Other weights from a batch on."""

    first_step: PositiveInt
    """The first of its batches, counted from 0: that of this step, as long as none was skipped."""
    weights: tuple[str, ...]
    """`name=weight` for every part of the mixture."""

    def by_name(self) -> dict[str, float]:
        """The weights as numbers. Raises ConfigError where one is none."""
        weights: dict[str, float] = {}
        for i, text in enumerate(self.weights):
            name, equals, number = text.partition("=")
            try:
                weight = float(number)
            except ValueError:
                weight = math.nan
            if not equals or not 0 <= weight < math.inf:
                raise ConfigError(f"weights.{i}", f"={text!r}: must be name=weight with a weight of at least 0")
            if name in weights:
                raise ConfigError(f"weights.{i}", f"={text!r}: {name} has a weight already")
            weights[name] = weight
        return weights

    def check(self) -> None:
        self.by_name()


@dataclass(frozen=True, kw_only=True)
class Data(Node):
    """Where text comes from and how it becomes sequences."""

    source: Source = "python-stdlib"
    """`python-stdlib` is the source text of the running Python's standard library: no download; `prepared` is a
    directory that `hybridlm prepare` made; `hybridlm list tasks` lists the others, which are no text."""
    task: Task | None = None
    """Of a source that is a task, its numbers; the defaults of that task when absent."""
    path: str | None = None
    """A file or a directory, for `text`, `jsonl` and `chat`; the directory, for `prepared`."""
    text_key: str = "text"
    """The field of a JSONL object that holds the text."""
    chat: Chat = Chat()
    """Of `source=chat`: JSON lines with `messages`, or with `prompt` and `response`."""
    mixture: tuple[Part, ...] = ()
    """Several sources instead of the one above, drawn from in the proportions of their weights."""
    stages: tuple[Stage, ...] = ()
    """When the weights of the mixture change; until the first of them they are the parts' own."""
    seq_len: Annotated[int, Range(2)] = 1024
    tokenizer: str = "byte"
    """`byte`, or a local tokenizer.json (Hugging Face tokenizers) or .model (SentencePiece) file."""
    packing: Literal["concatenate", "first-fit"] = "concatenate"
    """Documents in one stream that is cut every `seq_len`; or whole in sequences that have room, the rest padded.
    Conversations are always packed whole."""
    validation_fraction: Annotated[float, Range(0, 0.5, above=True)] = 0.02
    """Share of the documents held out, chosen by their names; of a corpus with one document, its end."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead."""
    workers: NonNegativeInt = 0
    """Processes that prepare batches; 0 is a thread. The batches are the same for any number."""

    def check(self) -> None:
        if self.source in TASKS:
            self._check_task(TASKS[self.source])
        elif self.task is not None:
            raise ConfigError("task", f": is a {type(self.task).__name__}, and source={self.source} has none")
        if not self.mixture:
            _check_path(self.source, self.path)
            if self.stages:
                raise ConfigError("stages", ": weigh the parts of a mixture, and there is no data.mixture")
        elif self.path is not None:
            raise ConfigError("path", f"={self.path!r}: is not read where data.mixture names the sources; leave it out")
        else:
            self._check_mixture()

    def _check_task(self, kind: type[Task]) -> None:
        task = self.task or kind()
        if self.task is None:
            # So that config.json and `hybridlm show` have its numbers.
            object.__setattr__(self, "task", task)
        if type(task) is not kind:
            raise ConfigError("task", f": is a {type(task).__name__}; source={self.source} needs a {kind.__name__}")
        if self.mixture or self.path is not None:
            wrong = "mixture" if self.mixture else "path"
            raise ConfigError(wrong, f": is not read where source={self.source} is a task; leave it out")
        least = max(task.shortest, task.lengths(self.seq_len).start)
        if task.longest(self.seq_len) < least:
            raise ConfigError(
                "seq_len",
                f"={self.seq_len}: must be at least {task.num_tokens(least)}, which {self.source} needs for {least} "
                f"{task.unit}",
            )

    def _check_mixture(self) -> None:
        names = [part.name for part in self.mixture]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ConfigError(f"mixture.{i}.name", f"={name!r}: another part has this name")
        if not any(part.weight for part in self.mixture):
            raise ConfigError("mixture", ": all weights are 0; give one part a weight")
        before = 0
        for i, stage in enumerate(self.stages):
            weights = stage.by_name()
            if stage.first_step <= before:
                raise ConfigError(
                    f"stages.{i}.first_step", f"={stage.first_step}: must be above {before}, that of the stage before"
                )
            for name in weights:
                if name not in names:
                    raise ConfigError(
                        f"stages.{i}.weights", f": {name} is no part of the mixture{suggestion(name, names)}"
                    )
            if missing := [name for name in names if name not in weights]:
                raise ConfigError(
                    f"stages.{i}.weights", f": lacks {', '.join(missing)}; give every part a weight, or 0 for none"
                )
            if not any(weights.values()):
                raise ConfigError(f"stages.{i}.weights", ": all are 0; give one part a weight")
            before = stage.first_step


def _check_path(source: str, path: str | None) -> None:
    if source not in ("python-stdlib", *TASKS) and path is None:
        raise ConfigError("path", f": is required by source={source}; give a file or a directory")
