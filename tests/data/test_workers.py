"""Processes that prepare batches: the same batches for any number of them, and none that outlives the run."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from hybridlm import config
from hybridlm.config import Part, Stage
from hybridlm.data.corpus import load_corpus
from hybridlm.data.pipeline import Batches
from hybridlm.data.sources import Document
from hybridlm.data.token_cache import cached_tokenize
from hybridlm.data.tokenizers import ByteTokenizer
from tests.data.rows import assert_same, draw


@pytest.fixture(autouse=True)
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(corpus: Path) -> config.Data:
    parts = (Part(name="all", path=str(corpus), weight=2), Part(name="first", path=str(corpus / "0.txt")))
    stages = (Stage(first_step=6, weights=("all=1", "first=1")),)
    return config.Data(mixture=parts, stages=stages, seq_len=32, packing="first-fit")


def batches_of(data: config.Data, workers: int) -> Batches:
    mixture = load_corpus(config.Data(**vars(data) | {"workers": workers})).train
    return Batches(mixture, batch_size=4, seed=7, sharding=None, prefetch=3, workers=workers)


def test_two_workers_go_on_where_a_thread_stopped(data: config.Data) -> None:
    expected = draw(batches_of(data, 0), 17)
    first = batches_of(data, 0)
    assert_same(draw(first, 5), expected[:5])
    second = batches_of(data, 2)
    second.set_state(first.state())
    assert_same(draw(second, 7), expected[5:12])
    assert multiprocessing.active_children() == []
    third = batches_of(data, 0)
    third.set_state(second.state())
    assert_same(draw(third, 5), expected[12:])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(data: config.Data, workers: int) -> None:
    expected = draw(batches_of(data, 0), 23)
    batches = batches_of(data, workers)
    batches.skip(4, 6)
    drawn = [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(9)]
    batches.skip(15, 15)
    drawn += draw(batches, 10)
    assert_same(drawn, [batch for i, batch in enumerate(expected) if i not in (4, 5, 6, 15)])


def test_workers_are_told_files_and_not_what_they_hold(corpus: Path) -> None:
    data = config.Data(source="text", path=str(corpus), seq_len=32, workers=2)
    [source] = load_corpus(data).train.sources
    stream = source.windows.stream
    _, told = stream.__reduce__()
    assert all(isinstance(part, Path | int) for part in told)
    again = copy.copy(stream)
    assert all(np.array_equal(a, b) for a, b in zip(again.read(5, 99), stream.read(5, 99), strict=True))
    assert np.array_equal(again.document_starts(), stream.document_starts())
    in_memory = cached_tokenize([Document("a", b"text")], ByteTokenizer())
    assert copy.copy(in_memory).tokens.tolist() == [256, *b"text", 256]


PROGRAM = """
    import multiprocessing, signal, sys, time
    def main():
        from hybridlm import config
        from hybridlm.data.corpus import load_corpus
        from hybridlm.data.pipeline import Batches
        data = config.Data(source="text", path=sys.argv[1], seq_len=32, workers=1)
        batches = Batches(load_corpus(data).train, batch_size=4, seed=7, sharding=None, prefetch=1, workers=1)
        next(batches)
        signal.signal(signal.SIGTERM, lambda *_: None)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        while True:
            next(batches)
            print("drawn", flush=True)
            time.sleep(0.1)
    if __name__ == "__main__":
        main()
"""


def is_running(pid: int) -> bool:
    """Zombies do not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks up processes in /proc")
def test_workers_outlast_signals_to_the_group_and_not_the_run(
    corpus: Path, tmp_path: Path, process_environment: dict[str, str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    with subprocess.Popen(
        [sys.executable, program, corpus],
        env=process_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as run:
        assert run.stdout is not None
        try:
            workers = [int(pid) for pid in run.stdout.readline().split()]
            assert workers and all(map(is_running, workers))
            os.killpg(run.pid, signal.SIGTERM)
            assert [run.stdout.readline() for _ in range(20)] == ["drawn\n"] * 20
            assert all(map(is_running, workers))
        finally:
            run.kill()
        deadline = time.monotonic() + 20
        while any(map(is_running, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
