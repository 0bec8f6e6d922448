"""Two runs started on one directory: one of them trains, the other says why it does not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hybridlm.config_check import ConfigError
from hybridlm.train import lock
from hybridlm.train.lock import DirectoryLock

HOLDS = """
import sys, time
from pathlib import Path
from hybridlm.train.lock import DirectoryLock
with DirectoryLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def holder(tmp_path: Path, process_environment: dict[str, str]) -> Any:
    """Another process that holds the directory."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    process = subprocess.Popen(command, env=process_environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def left_behind(directory: Path, **said: Any) -> None:
    record = {"host": "elsewhere", "pid": 1, "started": "2026-01-01T00:00:00+0000", "beat": 7} | said
    (directory / "run.lock").write_text(json.dumps(record))


def no_flock(*told: Any) -> None:
    raise OSError(lock.errno.ENOTSUP, "not supported")


def test_a_second_run_is_refused_in_one_line_until_the_first_is_gone(tmp_path: Path, holder: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        DirectoryLock(tmp_path).__enter__()
    said = str(refusal.value)
    assert f"{tmp_path}: another run is going on there (process {holder.pid} on " in said
    assert "\n" not in said
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with DirectoryLock(tmp_path):  # without waiting
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_directory_that_was_left_is_free(tmp_path: Path) -> None:
    for _ in range(2):
        with DirectoryLock(tmp_path):
            pass
    assert (tmp_path / "run.lock").read_bytes() == b""


def still_locked(*told: Any) -> None:
    raise BlockingIOError(lock.errno.EWOULDBLOCK, "the server has not heard of the host's death")


@pytest.mark.parametrize("flock", [lock.fcntl.flock, no_flock, still_locked])
def test_a_lock_of_another_host_that_stands_still_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: Callable[..., None]
) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", flock)
    left_behind(tmp_path)
    started = time.monotonic()
    with DirectoryLock(tmp_path, watch_seconds=0.5):
        assert time.monotonic() - started >= 0.5
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_a_lock_of_another_host_that_is_rewritten_is_respected(tmp_path: Path) -> None:
    left_behind(tmp_path)
    beat = threading.Timer(0.3, left_behind, (tmp_path,), {"beat": 8})
    beat.start()
    with pytest.raises(ConfigError, match=r"process 1 on elsewhere since 2026-01-01T00:00:00\+0000"):
        DirectoryLock(tmp_path, watch_seconds=20.0).__enter__()
    beat.join()


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 5], ids=["own", "dead"])
def test_without_flock_a_dead_process_of_this_host_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int
) -> None:
    monkeypatch.setattr(lock.fcntl, "flock", no_flock)
    left_behind(tmp_path, host=lock.socket.gethostname(), pid=pid)
    started = time.monotonic()
    with DirectoryLock(tmp_path, watch_seconds=20.0):
        assert time.monotonic() - started < 5


def test_the_holder_shows_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with DirectoryLock(tmp_path):
        deadline = time.monotonic() + 20
        while json.loads((tmp_path / "run.lock").read_text())["beat"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_run_on_a_held_directory_ends_with_2_and_changes_nothing(
    holder: Any, tmp_path: Path, tiny_config: Any, invoke: Callable[..., Any]
) -> None:
    from hybridlm import config_io

    config = tmp_path / "config_to_run.json"
    config_io.dump_json(tiny_config, config)
    invoke("train", config, "--out", tmp_path).assert_refused("another run is going on there", str(holder.pid))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config_to_run.json", "run.lock"]


def test_a_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, tiny_config: Any, invoke: Callable[..., Any]
) -> None:
    from hybridlm import config_io

    config_io.dump_json(tiny_config, tmp_path / "config.json")
    # Nobody, not even root, makes directories there.
    invoke("train", tmp_path / "config.json", "--out", "/proc/self/run").assert_refused(
        "/proc/self/run: cannot be written to: ", "; choose another --out"
    )
