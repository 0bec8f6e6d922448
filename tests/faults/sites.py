"""A directory in which one run is started again and again, by processes that are made to die."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hybridlm import config_io
from hybridlm.config import RGLRU, AdamW, Block, Checkpoint, Config, Cosine, Data, Eval, GeGLU, Model, Train
from tests.faults import history
from tests.faults.history import History
from tests.processes import Ended, Running, Start

WITNESS = "tests.faults.witness"


def quick_config(text: Path, *, layers: int, steps: int, evaluate_every: int, checkpoint: Checkpoint) -> Config:
    """A run of scanned recurrent layers, which compile in a second."""
    block = Block(mixer=RGLRU(width=32, num_heads=2), ffn=GeGLU(hidden=48))
    return Config(
        model=Model(vocab_size=264, width=32, num_layers=layers, pattern=(block,)),
        data=Data(source="text", path=str(text), seq_len=32, validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=3)),
        train=Train(steps=steps, batch_size=4, log_every=1),
        eval=Eval(every=evaluate_every, batches=2),
        checkpoint=checkpoint,
    )


class Site:
    """`config.json`, `run/`, and `handed.jsonl` of the witness."""

    def __init__(self, directory: Path, config: Config, start: Start):
        self.directory, self.run = directory, directory / "run"
        self._start = start
        self.configure(config)

    def configure(self, config: Config) -> None:
        config_io.dump_json(config, self.directory / "config.json")

    def module(self, name: str, text: str) -> str:
        """A module that a process can `--import`, which its working directory is on the path of; returns its name."""
        (self.directory / f"{name}.py").write_text(text)
        return name

    def start(self, processes: int = 1, devices: int = 1, *words: object, imports: Iterable[str] = ()) -> Running:
        """Start the run, or start it again."""
        modules = [word for name in (WITNESS, *imports) for word in ("--import", name)]
        return self._start(
            processes, devices, "config.json", "--out", "run", *modules, *words, directory=self.directory
        )

    def finish(self, processes: int = 1, devices: int = 1, *words: object, imports: Iterable[str] = ()) -> Ended:
        """Let the run go on to its last step; what its first process said."""
        ended = self.start(processes, devices, *words, imports=imports).ended()
        assert {process.code for process in ended} == {0}, "\n".join(process.out + process.err for process in ended)
        return ended[0]

    def last_step(self) -> int:
        """The last that is in metrics.jsonl."""
        return last_step(self.run)

    def until_step(self, running: Running, step: int) -> None:
        """Wait until a step is in metrics.jsonl."""
        running.wait_until(lambda: self.last_step() >= step, poll_seconds=0.002)

    def kill_behind(self, step: int, imports: Iterable[str] = ()) -> None:
        """Start the run, and kill it when that step is in metrics.jsonl."""
        running = self.start(imports=imports)
        self.until_step(running, step)
        running.kill()
        running.ended()

    def saved(self) -> list[int]:
        return saved(self.run)

    def resumes_at(self) -> int:
        """The step that the next process goes on from."""
        return max(self.saved(), default=0)

    def being_saved(self) -> bool:
        return being_saved(self.run)

    def records(self) -> list[dict[str, Any]]:
        return list(history.records(self.run / "metrics.jsonl").values())

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.run / "events.jsonl").read_text().splitlines()]
        return [line for line in lines if line["event"] in kinds]

    def history(self) -> History:
        return history.history(self.run)

    def assert_same(self, undisturbed: "Site", *, rtol: float = 0.0) -> None:
        """This run learnt what the undisturbed one did, within `rtol`, from the same batches, each of them once."""
        history.assert_same(self.history(), undisturbed.history(), rtol=rtol)
        mine, theirs = (history.entered(site.directory / "handed.jsonl") for site in (self, undisturbed))
        assert list(mine) == list(theirs)
        assert mine == theirs


def last_step(run: Path) -> int:
    """The last that is in metrics.jsonl; 0 where there is none."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def saved(run: Path) -> list[int]:
    """Steps of the checkpoints that were committed, or look so."""
    directory = run / "checkpoints"
    return sorted(int(name) for name in os.listdir(directory) if name.isdecimal()) if directory.is_dir() else []


def being_saved(run: Path) -> bool:
    """Whether a checkpoint is being written, or was when the run died."""
    directory = run / "checkpoints"
    return directory.is_dir() and any("tmp" in name for name in os.listdir(directory))


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    """To half of it."""
    os.truncate(path, path.stat().st_size // 2)
