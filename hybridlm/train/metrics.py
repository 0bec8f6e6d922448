"""Where numbers and events of a run go: JSON lines, TensorBoard, and a line or a progress bar for people."""

import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridlm.train.tensorboard import TensorBoard


class JsonLines:
    """A file of JSON objects that have a `step`. It survives a resume from an earlier step, and a crash while writing.

    Raises OSError, which names the file, where a line cannot be written, as on a full disk.
    """

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All complete lines; one cut short by a crash is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def keep_until(self, step: int) -> None:
        """Drop what was written after `step`: those steps will be run again."""
        if not self.path.exists():
            return
        kept = [record for record in self.read() if record["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(temporary, self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. JSON has no NaN: a value that is not finite is written as null."""
        finite = {
            name: [_finite(v) for v in value] if isinstance(value, list) else _finite(value)
            for name, value in record.items()
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(finite, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written: {error.strerror}") from error


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
    """`events.jsonl`: what happened to a run, one object per line, never taken back. Only the first process writes."""

    def __init__(self, directory: Path | None):
        self._lines = None if directory is None else JsonLines(directory / "events.jsonl")
        if self._lines is not None:
            self._lines.keep_until(sys.maxsize)  # without a line cut short by a crash

    def add(self, event: str, step: int, **more: Any) -> None:
        if self._lines is not None:
            told = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            self._lines.append({"event": event, "step": step, "time": told} | more)


class RunLog:
    """Writes a run's metrics and tells them to people: the first process' part."""

    def __init__(self, directory: Path, first_step: int, total_steps: int):
        self.metrics = JsonLines(directory / "metrics.jsonl")
        self.evals = JsonLines(directory / "eval.jsonl")
        self.continuations = JsonLines(directory / "samples.jsonl")
        for lines in (self.metrics, self.evals, self.continuations):
            lines.keep_until(first_step)
        self._tensorboard = TensorBoard(directory / "tensorboard", first_step)
        self._progress = Progress(first_step, total_steps)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        # What went wrong before is what a person has to know, not that closing goes wrong for the same reason.
        passed_over = contextlib.nullcontext() if exception[0] is None else contextlib.suppress(OSError)
        with passed_over:
            self._tensorboard.close()

    def evaluated(self, step: int) -> bool:
        """Whether the run's own held-out loss is there; `hybridlm eval` names the task in its lines."""
        return any(record["step"] == step and "task" not in record for record in self.evals.read())

    def sampled(self, step: int, prompts: Sequence[str]) -> bool:
        """Whether each prompt has its line of this step."""
        return not Counter(prompts) - self._prompts_at(step)

    def _prompts_at(self, step: int) -> Counter[str]:
        return Counter(record["prompt"] for record in self.continuations.read() if record["step"] == step)

    def train(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self._write_scalars("train", record)
        self._progress.show(record)

    def eval(self, record: dict[str, Any]) -> None:
        self.evals.append(record)
        self._write_scalars("eval", record)
        self._progress.say(
            f"step {record['step']}: held-out loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}, "
            f"bits per byte {record['bits_per_byte']:.4f} ({record['tokens']:,} tokens)"
            + (f", {record['moe_dropped']:.2%} of choices dropped" if record.get("moe_dropped") else "")
        )

    def samples(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        """Those that are not there yet: a crash may have come between the lines of one step."""
        written = self._prompts_at(step)
        for record in records:
            if written[record["prompt"]]:
                written[record["prompt"]] -= 1
                continue
            self.continuations.append(record)
            self._progress.say(f"step {step}: {record['prompt']!r} goes on {record['text']!r}")

    def say(self, text: str) -> None:
        self._progress.say(text)

    def _write_scalars(self, prefix: str, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                self._tensorboard.add(f"{prefix}/{name}", value, record["step"])


class NoLog:
    """The other processes' part, which is none: their numbers are the same."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def evaluated(self, step: int) -> bool:
        return False

    def sampled(self, step: int, prompts: Sequence[str]) -> bool:
        return False

    def train(self, record: dict[str, Any]) -> None:
        pass

    def eval(self, record: dict[str, Any]) -> None:
        pass

    def samples(self, step: int, records: Sequence[dict[str, Any]]) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Progress:
    """A bar on a terminal, one line per record in a file."""

    def __init__(self, first_step: int, total_steps: int):
        self._total = total_steps
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def show(self, record: dict[str, Any]) -> None:
        step = record["step"]
        values = (
            f"loss {record['loss']:.4f}  bits/byte {record['bits_per_byte']:.3f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.1%}"
        )
        if record.get("aux/moe_dropped"):
            values += f"  dropped {record['aux/moe_dropped']:.2%}"
        if self._bar is not None:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            eta = timedelta(seconds=round((self._total - step) * record["step_time_s"]))
            print(f"step {step}/{self._total}  {values}  ETA {eta}", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
