"""Launchers run in this process, and stand-ins for the programs that they call."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from hybridlm.config_check import ConfigError
from launch import box, gke, slurm, tpu_vm

LAUNCHERS = {"box": box.main, "gke": gke.main, "slurm": slurm.main, "tpu_vm": tpu_vm.main}


class Said(NamedTuple):
    """What a launcher printed, or the one line by which it refused."""

    out: str
    refusal: str


@pytest.fixture
def launch(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`launch(name, *words)`."""

    def run(name: str, *words: str) -> Said:
        try:
            assert LAUNCHERS[name](words) == 0
        except ConfigError as error:
            assert "\n" not in str(error)
            return Said(capsys.readouterr().out, str(error))
        return Said(capsys.readouterr().out, "")

    return run


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`programs(name=script, ...)`: shell scripts found before everything else; their calls are logged in `calls`."""
    directory, calls = tmp_path / "bin", tmp_path / "calls"
    directory.mkdir()
    calls.touch()
    monkeypatch.setenv("PATH", str(directory), prepend=":")

    def write(**scripts: str) -> Path:
        for name, script in scripts.items():
            path = directory / name
            path.write_text(f'#!/bin/bash\necho "{name} $*" >> {calls}\n{script}\n')
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return calls

    return write
