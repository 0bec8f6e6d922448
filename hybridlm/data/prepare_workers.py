"""The parts of a preparation over processes of this machine, with how far they are."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hybridlm.data.prepare import Job, Part, begin, decide_sides, finish, parts_of, plan_of, prepare_part, size_of
from hybridlm.data.prepare_sources import Source
from hybridlm.data.tokenizers import load_tokenizer

SHARD_BYTES, RECORD_TOKENS = 64_000_000, 4096
"""Of `prepare_here`: of the source in a shard, about, and in one of its records."""
SECONDS_BETWEEN_LINES = 30
# By which the source's bytes are counted over processes; finer costs a lock each time.
COUNTED_BYTES = 1 << 20

_counter: "Synchronized[int] | None" = None


class Progress:
    """Shows a bar on a terminal, else a line now and then, on stderr."""

    def __init__(self, total: int, num_parts: int):
        self.total, self.num_parts = total, num_parts
        self._begun = self._told = time.monotonic()
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="prepare") if sys.stderr.isatty() else None

    def show(self, num_bytes: int, parts_done: int) -> None:
        """So far."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(num_bytes - self._bar.n)
        elif now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            share, rate = num_bytes / max(self.total, 1), num_bytes / 1e6 / (now - self._begun)
            left = (now - self._begun) * (1 - share) / share if share else float("inf")
            line = f"prepare: {share:.1%}, {parts_done} of {self.num_parts} parts, {rate:.1f} MB/s, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def prepare_here(source: Source, tokenizer_name: str, directory: Path) -> None:
    """Shards of all documents of `source`, none of them set apart, in a new `directory`, made by this process.

    Raises:
        ConfigError: there is no text, or some that cannot be read.
    """
    tokenizer, parts = load_tokenizer(tokenizer_name), list(parts_of(source, SHARD_BYTES))
    plan = plan_of(source, tokenizer, shard_bytes=SHARD_BYTES, record_tokens=RECORD_TOKENS, validation_fraction=0)
    begin(directory, plan, len(parts), verify=False)
    job = Job(source, tokenizer_name, directory, RECORD_TOKENS, decide_sides(source, parts, 0))
    run_here(job, dict(enumerate(parts)))
    finish(directory, tokenizer, plan, len(parts), RECORD_TOKENS)


def run_here(job: Job, parts: Mapping[int, Part]) -> None:
    """Make `parts` one after the other in this process."""
    progress = Progress(size_of(parts.values()), len(parts))
    done = 0
    try:
        for finished, (number, part) in enumerate(parts.items()):

            def advance(num_bytes: int, finished: int = finished) -> None:
                nonlocal done
                done += num_bytes
                progress.show(done, finished)

            prepare_part(job, number, part, advance)
    finally:
        progress.close()


def run_in_processes(job: Job, parts: Mapping[int, Part], workers: int) -> None:
    """Make `parts` in `workers` processes, which end with this one, however it ends.

    Raises:
        ConfigError: some part cannot be made; those that are done stay done.
        OSError: a process has died.
    """
    spawn = multiprocessing.get_context("spawn")
    counter = spawn.Value("q", 0)
    progress = Progress(size_of(parts.values()), len(parts))
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin_worker, initargs=(counter,))
    try:
        # Ctrl-C reaches all processes of a terminal; this one ends the others, which ignore it from their first moment.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            pending = {pool.submit(_prepare_part, job, number, part) for number, part in parts.items()}
        finally:
            signal.signal(signal.SIGINT, before)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when="FIRST_COMPLETED")
            for future in done:
                future.result()
            progress.show(counter.value, len(parts) - len(pending))
        pool.shutdown()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker of `hybridlm prepare` has died, of too little memory perhaps; "
            "the same command with fewer --workers goes on"
        ) from error
    finally:
        progress.close()
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _prepare_part(job: Job, number: int, part: Part) -> None:
    assert _counter is not None
    counter, uncounted = _counter, 0

    def advance(num_bytes: int) -> None:
        nonlocal uncounted
        uncounted += num_bytes
        if uncounted >= COUNTED_BYTES:
            count()

    def count() -> None:
        nonlocal uncounted
        with counter.get_lock():
            counter.value += uncounted
        uncounted = 0

    prepare_part(job, number, part, advance)
    count()
