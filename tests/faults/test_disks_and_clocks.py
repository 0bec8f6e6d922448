"""Disks that are full, slow or cannot be written, clocks that jump, and two runs that want one directory."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hybridlm.config import Config
from tests.faults.sites import Site
from tests.processes import Start


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """`mount(path, options)`: a file system in memory. Skips the test where that is not allowed."""
    mounted: list[Path] = []

    def make(path: Path, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"file systems cannot be mounted here: {done.stderr.strip()}")
        mounted.append(path)

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def own_disk(config: Config, start: Start, tmp_path: Path, mount: Callable[..., None]) -> Site:
    """A run whose directory is on a file system of 8 MB of its own."""
    site = Site(tmp_path, config, start)
    site.run.mkdir()
    mount(site.run, "size=8m")
    return site


FULL = """
import contextlib, threading, time
from pathlib import Path

from hybridlm.data.pipeline import Batches

RUN = Path("run")
next_batch = Batches.__next__


def filling(self):
    if self.position == 6:
        while not (RUN / "checkpoints/4/_integrity.0-of-1.json").exists():
            time.sleep(0.01)
        # As threads of a save that was given up do, which wait for one another.
        threading.Thread(target=time.sleep, args=(600,)).start()
        with contextlib.suppress(OSError):
            (RUN / "filler").write_bytes(bytes(8 << 20))
    return next_batch(self)


Batches.__next__ = filling
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_goes_on_bitwise(
    undisturbed: Any, own_disk: Site
) -> None:
    wanted, site = undisturbed(), own_disk
    [ended] = site.start(imports=[site.module("full", FULL)]).ended()
    assert ended.code == 1
    assert ended.err.count("\n") == 1 and ended.err.startswith("hybridlm: "), ended.err
    (site.run / "filler").unlink()
    said = site.finish().out
    assert "resumed from step" in said and "damaged" not in said
    site.assert_same(wanted)


@pytest.mark.slow
def test_a_directory_that_cannot_be_written_is_refused_and_the_run_in_it_goes_on_bitwise(
    undisturbed: Any, own_disk: Site
) -> None:
    wanted, site = undisturbed(), own_disk
    running = site.start()
    running.wait_until(lambda: 8 in site.saved(), poll_seconds=0.001)
    running.kill()
    running.ended()
    subprocess.run(["mount", "-o", "remount,ro", str(site.run)], check=True)
    [refused] = site.start().ended()
    assert refused.code == 2
    assert refused.err.count("\n") == 1 and "Read-only file system" in refused.err
    subprocess.run(["mount", "-o", "remount,rw", str(site.run)], check=True)
    site.finish()
    site.assert_same(wanted)


LIMITED = """
import os, resource
if os.environ["HYBRIDLM_PROCESS_ID"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_of_two_hosts_ends_both_in_time(undisturbed: Any, site: Site) -> None:
    """Each of them writes a half of the large arrays."""
    wanted = undisturbed(2, 1)
    running = site.start(2, 1)
    site.until_step(running, 6)
    running.kill()
    running.ended()
    kept = site.saved()
    limited = site.start(2, 1, "--checkpoint.timeout_seconds=10", imports=[site.module("limited", LIMITED)])
    first, second = limited.ended()
    assert 0 not in (first.code, second.code)
    assert "could not be saved" in first.err + second.err, first.err + second.err
    assert site.saved() == kept
    site.finish(2, 1)
    site.assert_same(wanted)


AHEAD = """
import os, time
real = time.time
saving = []

def ahead():
    if not saving and os.path.isdir("run/checkpoints") and any("tmp" in name for name in os.listdir("run/checkpoints")):
        saving.append(True)
    return real() + (86400.0 if saving else 0.0)

time.time = ahead
"""
SLOW_AND_BACKWARDS = """
import os, time
real, began = time.time, time.monotonic()
time.time = lambda: real() - 3600.0 * int(time.monotonic() - began)

def slowed(function):
    def after_a_while(*args, **kwargs):
        time.sleep(0.1)
        return function(*args, **kwargs)
    return after_a_while

for name in ("fsync", "replace", "rename", "rmdir"):
    setattr(os, name, slowed(getattr(os, name)))
"""


@pytest.mark.slow
def test_a_clock_that_jumps_back_and_a_slow_disk_change_nothing(undisturbed: Any, site: Site) -> None:
    wanted, module = undisturbed(), site.module("slow_and_backwards", SLOW_AND_BACKWARDS)
    site.kill_behind(10, imports=[module])
    site.finish(imports=[module])
    site.assert_same(wanted)
    assert all(0 <= record["goodput"] <= 1 for record in site.records())


@pytest.mark.slow
def test_a_clock_that_jumps_a_day_ahead_within_a_save_costs_at_most_that_save(undisturbed: Any, site: Site) -> None:
    """Orbax may take it for a save that came too late."""
    wanted = undisturbed()
    [ended] = site.start(1, 1, "--checkpoint.timeout_seconds=20", imports=[site.module("ahead", AHEAD)]).ended()
    if ended.code:
        assert ended.code == 1
        assert ended.err.count("\n") == 1 and "could not be saved" in ended.err
        site.finish()
    site.assert_same(wanted)


@pytest.mark.slow
def test_a_second_run_in_the_directory_is_refused_and_the_first_goes_on_bitwise(undisturbed: Any, site: Site) -> None:
    wanted = undisturbed()
    first = site.start()
    first.wait_for("directory")
    first.send(signal.SIGSTOP)  # that it does not end before the second has begun
    [second] = site.start().ended()
    first.send(signal.SIGCONT)
    assert second.code == 2, second.err
    assert second.err.count("\n") == 1 and f"process {first.processes[0].pid} on" in second.err
    assert [process.code for process in first.ended()] == [0]
    site.assert_same(wanted)
    # The lock is gone with a process however that ended: what was killed can be started again, as all these tests do.
