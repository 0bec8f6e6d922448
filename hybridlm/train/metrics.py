"""Where numbers of a run go: metrics.jsonl, TensorBoard events, and a line or a progress bar for people."""

import json
import math
import os
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm


class JsonLines:
    """A file of JSON objects that have a `step`, which survives a resume from an earlier step."""

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
        with self.path.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Writes a run's metrics, of one process."""

    def __init__(self, directory: Path, first_step: int, total_steps: int):
        self.metrics = JsonLines(directory / "metrics.jsonl")
        self.evals = JsonLines(directory / "eval.jsonl")
        for lines in (self.metrics, self.evals):
            lines.keep_until(first_step)
        # Events after `purge_step` are discarded by TensorBoard: a resumed run writes them again.
        self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step + 1)
        self._progress = Progress(first_step, total_steps)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._events.close()
        self._progress.close()

    def evaluated(self, step: int) -> bool:
        return any(record["step"] == step for record in self.evals.read())

    def train(self, record: dict[str, Any]) -> None:
        self.metrics.append(record)
        self._write_events("train", record)
        self._progress.show(record)

    def eval(self, record: dict[str, Any]) -> None:
        self.evals.append(record)
        self._write_events("eval", record)
        self._progress.say(
            f"step {record['step']}: held-out loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}, "
            f"bits per byte {record['bits_per_byte']:.4f} ({record['tokens']:,} tokens)"
            + (f", {record['moe_dropped']:.2%} of choices dropped" if record.get("moe_dropped") else "")
        )

    def say(self, text: str) -> None:
        self._progress.say(text)

    def _write_events(self, prefix: str, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._events.add_scalar(f"{prefix}/{name}", value, record["step"])


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
