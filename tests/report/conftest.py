"""Run directories as training would leave them, written without training."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import RGLRU, Attention, Block, Config, Data, GeGLU, Model, Train

Record = dict[str, Any]
WriteRun = Callable[..., Path]


def config_of(**train: Any) -> Config:
    ffn = GeGLU(hidden=24)
    pattern = (
        Block(mixer=RGLRU(width=16, num_heads=2), ffn=ffn),
        Block(mixer=Attention(num_heads=2, num_kv_heads=1, window=8), ffn=ffn),
    )
    return Config(
        model=Model(vocab_size=264, width=16, num_layers=5, pattern=pattern),
        data=Data(seq_len=32),
        train=Train(**{"steps": 40, "batch_size": 4, "log_every": 2} | train),
    )


def records_of(steps: Sequence[int], seed: int = 0) -> list[Record]:
    """Metrics of plausible size at these steps; the same for the same seed."""
    rng = np.random.default_rng(seed)
    found = []
    for step in steps:
        loss = 1.3 + 3.8 * math.exp(-3 * step / steps[-1]) + 0.1 * float(rng.normal())
        speed = 5000.0 + 300 * float(rng.normal())
        found.append(
            {
                "step": step,
                "tokens": 128 * step,
                "loss": loss,
                "bits_per_byte": loss / math.log(2),
                "grad_norm": 0.4 + float(rng.gamma(2.0, 0.2)),
                "lr": 3e-3 * min(step / 10, 1.0),
                "nonfinite_total": 0,
                "tokens_per_second": speed,
                "mfu": speed / 20000,
                "step_time_s": 128 / speed,
                "tokens/code": 96 * step,
                "tokens/docs": 32 * step,
                "epoch/code": step / 1000,
                "epoch/docs": step / 100,
                "aux/moe_max_load": 1.0 + float(rng.gamma(2.0, 0.2)),
                "layers/moe_max_load": [1.5, 1.25],
                "aux/memory_used": 0.3,
                "data_wait_s": 0.0,
                "goodput": 0.9,
            }
        )
    return found


def held_out_of(steps: Sequence[int]) -> list[Record]:
    return [
        {
            "step": step,
            "loss": 1.4 + 30 / (step + 10),
            "perplexity": math.exp(1.4 + 30 / (step + 10)),
            "bits_per_byte": 2.0 + 40 / (step + 10),
            "tokens": 4096,
            "bytes": 4096,
            "by_position": [[0, 16, 2.0], [16, 32, 1.5]],
        }
        for step in steps
    ]


def as_lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    def write(name: str = "a_run", config: Config | None = None, **files: str | Record | list[Record]) -> Path:
        """A run directory; `metrics=[...]` are the lines of metrics.jsonl, a text is its text, a dict a JSON file's."""
        directory = tmp_path / name
        directory.mkdir()
        config_io.dump_json(config or config_of(), directory / "config.json")
        for stem, content in ({"metrics": records_of(range(2, 41, 2))} | files).items():
            match content:
                case dict():
                    (directory / f"{stem}.json").write_text(json.dumps(content))
                case list():
                    (directory / f"{stem}.jsonl").write_text(as_lines(content))
                case _:
                    (directory / f"{stem}.jsonl").write_text(content)
        return directory

    return write
