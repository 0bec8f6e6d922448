"""A process that hangs ends by itself, and says where it hung."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.train import watchdog
from hybridlm.train.watchdog import Watchdog

HANGS = """
import time
from hybridlm.data.pipeline import Batches
hand_out = Batches.__next__
def waits_for_ever(self):
    time.sleep(300)
def third_hangs(self):
    return waits_for_ever(self) if self.position == 1 else hand_out(self)
Batches.__next__ = third_hangs
from hybridlm.cli import main
main()
"""


def test_a_hung_run_ends_with_its_stacks_and_keeps_its_checkpoints(
    tiny_config: Config, tmp_path: Path, process_environment: dict[str, str]
) -> None:
    config_io.dump_json(tiny_config, tmp_path / "config.json")
    words = ["train", str(tmp_path / "config.json"), "--out", str(tmp_path / "run"), "--train.hang-seconds=3"]
    words += ["--checkpoint.every=2"]
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", HANGS, *words], env=process_environment, capture_output=True, text=True, timeout=240
    )
    assert time.monotonic() - started < 200
    assert process.returncode == 1
    assert "Timeout (0:00:03)!" in process.stderr
    assert "in waits_for_ever" in process.stderr
    assert "in train" in process.stderr
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


class Recorded:
    """Stands in for `faulthandler`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def dump_traceback_later(self, seconds: float, *, exit: bool, file: int) -> None:
        assert exit and file == 2
        self.calls.append(f"in {seconds:g} s")

    def cancel_dump_traceback_later(self) -> None:
        self.calls.append("never")


@pytest.fixture
def alarms(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(watchdog, "faulthandler", recorded)
    return recorded


def test_every_sign_of_life_begins_the_time_anew(alarms: Recorded) -> None:
    with Watchdog(1e-9) as dog:
        dog.alive()
        dog.alive()
        with dog.off():
            assert alarms.calls[-1] == "never"
        dog.alive()
    assert alarms.calls == ["in 1e-09 s", "in 1e-09 s", "never", "in 1e-09 s", "never"]


def test_fast_steps_do_not_arm_it_each_time(alarms: Recorded) -> None:
    with Watchdog(1800) as dog:
        for _ in range(1000):
            dog.alive()
    assert alarms.calls == ["in 1800 s", "never"]


def test_the_first_batch_of_an_evaluation_may_be_compiled(alarms: Recorded) -> None:
    with Watchdog(1e-9) as dog:
        dog.alive()
        seen = [(batch, alarms.calls[-1]) for batch in dog.watched("ab", compiled=False)]
        assert seen == [("a", "never"), ("b", "in 1e-09 s")]
        seen = [(batch, alarms.calls[-1]) for batch in dog.watched("ab", compiled=True)]
        assert seen == [("a", "in 1e-09 s"), ("b", "in 1e-09 s")]


def test_none_is_never(alarms: Recorded) -> None:
    with Watchdog(None) as dog:
        dog.alive()
    assert alarms.calls == []
