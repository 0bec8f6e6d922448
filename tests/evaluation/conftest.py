"""A run that commands may write their numbers to, and its scorer."""

import shutil
from pathlib import Path

import pytest

from hybridlm.config import Config
from hybridlm.evaluation.scoring import Scorer, open_run


@pytest.fixture(scope="session")
def run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `trained_run`."""
    return Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("evaluated") / "run"))


@pytest.fixture(scope="session")
def scorer(run: Path, tiny_config: Config) -> Scorer:
    """Windows of 32 tokens, the length of the sequences in training."""
    return open_run(tiny_config, run, 32)
