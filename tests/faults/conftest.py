"""A run of seconds, undisturbed and in directories of its own to be disturbed."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hybridlm.config import Checkpoint, Config
from hybridlm.train import loop
from tests import processes
from tests.corpora import write_corpus
from tests.faults.devices import on_two_devices
from tests.faults.sites import Site, quick_config, saved

STEPS = 24


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few kB, which the run goes through more than once."""
    return write_corpus(tmp_path_factory.mktemp("text"), files=6, sentences=30)


@pytest.fixture(scope="session")
def config(text: Path) -> Config:
    """Checkpoints are kept, so that a test can go back to any."""
    return quick_config(text, layers=2, steps=STEPS, evaluate_every=8, checkpoint=Checkpoint(every=4, keep=2 * STEPS))


@pytest.fixture
def site(tmp_path: Path, config: Config, start: processes.Start) -> Site:
    """Where a run of `config` is going to be."""
    return Site(tmp_path, config, start)


Undisturbed = Callable[..., Site]


@pytest.fixture(scope="session")
def undisturbed(
    config: Config, process_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    """`undisturbed(processes, devices, config, *imports)`: the run that nothing happens to. It also fills the
    compilation cache, which therefore no killed process writes to.
    """
    runs: dict[tuple[int, int, Config], Site] = {}

    def run(count: int = 1, devices: int = 1, config: Config = config, *imports: str) -> Site:
        key = count, devices, config
        if key not in runs:
            directory = tmp_path_factory.mktemp("undisturbed")
            with processes.starting(process_environment, directory) as start:
                site = Site(directory, config, start)
                site.finish(count, devices, imports=imports)
            runs[key] = site
        return runs[key]

    yield run


@pytest.fixture
def two_devices() -> Iterator[None]:
    """For runs in this process."""
    with on_two_devices():
        yield


@pytest.fixture(scope="session")
def done(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing happened to, in this process on two devices."""
    directory = tmp_path_factory.mktemp("done") / "run"
    with on_two_devices():
        assert loop.train(config, directory) == 0
    return directory


@pytest.fixture
def died(done: Path, tmp_path: Path) -> Path:
    """A copy of it as it was when a process died in its 18th step: the last checkpoint is that of step 16."""
    directory = tmp_path / "run"
    shutil.copytree(done, directory)
    for step in saved(directory):
        if step > 16:
            shutil.rmtree(directory / "checkpoints" / str(step))
    metrics = directory / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:17]))
    evaluations = directory / "eval.jsonl"
    evaluations.write_text("".join(evaluations.read_text().splitlines(keepends=True)[:2]))
    return directory
