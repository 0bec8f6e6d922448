"""What a run directory holds, as far as a report tells it. Files may be cut short by a crash or still be written."""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.report.numbers import is_number
from hybridlm.report.series import Record


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, as its directory tells it. Files that are not there are empty."""

    name: str
    config: Config
    environment: Mapping[str, Any]
    metrics: list[Record]
    """Of the logged steps, each once, in order."""
    held_out: list[Record]
    tasks: dict[str, list[Record]]
    """Other evaluations, by name, in the order in which they came first."""
    samples: list[Record]
    events: list[Record]
    goodput: Mapping[str, Any]
    origin: Mapping[str, Any]
    plan: Mapping[str, Any] | None

    @property
    def last_step(self) -> int:
        """The last that was logged, evaluated, saved or stopped at; 0 where there is none."""
        ends = [event for event in self.events[-1:] if event.get("event") in ("saved", "stopped")]
        return max((step_of(record) for record in (*self.metrics[-1:], *self.held_out[-1:], *ends)), default=0)

    @property
    def tokens(self) -> int:
        """Up to the last step."""
        return self.last_step * self.config.train.batch_size * self.config.data.seq_len


def read_run(directory: Path, name: str, plan: Path | None = None) -> Run:
    """The run in `directory`; `plan` is a file that `hybridlm plan --json` wrote (default: `plan.json` in there).

    Raises ConfigError where the directory holds no run. One that ended in its first step has a report, too.
    """
    config = config_io.load_run_config(directory)
    evals = json_lines(directory / "eval.jsonl")
    tasks: dict[str, list[Record]] = {}
    for record in evals:
        if "task" in record:
            tasks.setdefault(str(record["task"]), []).append(record)
    beside = directory / "plan.json"
    if plan is None and beside.is_file():
        plan = beside
    return Run(
        name=name,
        config=config,
        environment=json_object(directory / "environment.json"),
        metrics=once_per_step(json_lines(directory / "metrics.jsonl")),
        held_out=once_per_step([record for record in evals if "task" not in record]),
        tasks={task: latest(records, "step") for task, records in tasks.items()},
        samples=latest(json_lines(directory / "samples.jsonl"), "step", "prompt"),
        events=[event for event in json_lines(directory / "events.jsonl") if is_number(event.get("step"))],
        goodput=json_object(directory / "goodput.json"),
        origin=json_object(directory / "origin.json"),
        plan=None if plan is None else read_plan(plan),
    )


def json_lines(path: Path) -> list[Record]:
    """The objects in a file of JSON lines; a line that is none, such as half of the last, is left out."""
    found: list[Record] = []
    for line in text_of(path).split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def json_object(path: Path) -> dict[str, Any]:
    """Empty where there is none, as after a crash while it was written."""
    try:
        found = json.loads(text_of(path))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def step_of(record: Record) -> int:
    """The record's step; 0 where it has none."""
    step = record.get("step")
    return int(step) if is_number(step) else 0


def text_of(path: Path) -> str:
    """Raises ConfigError where the file is there and cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(str(path), f": cannot be read: {error.strerror}") from None


def once_per_step(records: Sequence[Record]) -> list[Record]:
    """What was written of steps that were run again counts as it was the last time, as for the run itself."""
    kept: list[Record] = []
    for record in records:
        if not is_number(record.get("step")):
            continue
        while kept and step_of(kept[-1]) >= step_of(record):
            kept.pop()
        kept.append(record)
    return kept


def latest(records: Sequence[Record], *keys: str) -> list[Record]:
    """One for all values of `keys`: the last, at the place of the first."""
    found: dict[Hashable, Record] = {}
    for record in records:
        found[tuple(str(record.get(key)) for key in keys)] = record
    return list(found.values())


def read_plan(path: Path) -> dict[str, Any]:
    """The record of `hybridlm plan --json`; of a search's, the best. Raises ConfigError where the file is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--plan {path}", f": cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if isinstance(found, dict) and found.get("ranked"):
        found = found["ranked"][0]["report"]
    if not (isinstance(found, dict) and {"topology", "memory", "fits"} <= found.keys()):
        raise ConfigError(
            f"--plan {path}", ": is no plan; `hybridlm plan CONFIG --topology NAME --json FILE` writes one"
        )
    return found


def names_of(directories: Sequence[Path]) -> list[str]:
    """The directories' own names; whole paths where two of these are the same."""
    names = [directory.resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]
