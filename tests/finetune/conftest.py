"""Runs to fine-tune, and text that they have not seen."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm import config_io
from hybridlm.config import Config


@pytest.fixture(scope="session")
def other_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six small files of other words than the corpus has."""
    directory = tmp_path_factory.mktemp("other")
    for i in range(6):
        (directory / f"{i}.txt").write_text("ZEBRAS QUIVER. " * (30 + i))
    return directory


@pytest.fixture(scope="session")
def new_text_config(tiny_config: Config, other_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a config that trains `tiny_config`'s model on that text for 8 steps, a checkpoint each 4."""
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, path=str(other_text)),
        train=replace(tiny_config.train, steps=8),
        eval=replace(tiny_config.eval, every=8),
    )
    path = tmp_path_factory.mktemp("config") / "config.json"
    config_io.dump_json(config, path)
    return path


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """Writes JSON lines, of objects or of text as it is."""

    def write(*records: object) -> Path:
        path = tmp_path / "chat.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write
