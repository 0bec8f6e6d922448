"""Processes that are killed, stopped, hang or are told to stop: the run goes on as if nothing had happened."""

import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hybridlm.config import Config
from tests.faults.sites import Site


def test_a_killed_run_goes_on_bitwise(undisturbed: Any, site: Site, rng: np.random.Generator) -> None:
    """Twice: after a random step, and with a checkpoint half written."""
    wanted = undisturbed()
    running = site.start()
    step = int(rng.integers(5, 10))
    running.wait_until(lambda: site.last_step() >= step and bool(site.saved()), poll_seconds=0.002)
    running.kill()
    running.ended()
    before = site.saved()

    running = site.start()
    running.wait_until(lambda: site.being_saved() and site.last_step() > before[-1], poll_seconds=0.001)
    running.kill()
    running.ended()
    assert site.being_saved(), "the save was over before the process was killed"
    assert set(before) <= set(site.saved())

    site.finish()
    site.assert_same(wanted)
    assert len(site.events("restored")) == 2


@pytest.mark.slow
def test_a_dozen_kills_at_random_moments_lose_nothing(
    config: Config, undisturbed: Any, site: Site, rng: np.random.Generator
) -> None:
    """Anywhere from the beginning of a process until some steps behind its first save."""
    config = replace(config, train=replace(config.train, steps=72))
    wanted = undisturbed(1, 1, config)
    site.configure(config)
    for _ in range(12):
        running = site.start()
        further = int(rng.integers(-3, 9))
        if further > 0:
            site.until_step(running, min(site.resumes_at() + further, 72))
        else:
            running.wait_for("directory")
        running.kill()
        assert running.ended()[0].code == -signal.SIGKILL
    site.finish()
    site.assert_same(wanted)


COUNTED = """
import os, time
import jax
from hybridlm.ffns import gated_mlp
forward = gated_mlp.GatedMLP.__call__

def began():
    with open("microbatches", "ab") as file:
        file.write(b".")
    time.sleep(0.2)

def counted(self, x, segments, carry, given):
    if given.training:
        jax.debug.callback(began)
    return forward(self, x, segments, carry, given)

gated_mlp.GatedMLP.__call__ = counted
"""


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_accumulation_goes_on_bitwise(
    config: Config, undisturbed: Any, site: Site
) -> None:
    """A step is 4 microbatches, each of which is watched when it begins."""
    config = replace(
        config,
        train=replace(config.train, num_microbatches=4, steps=8),
        model=replace(config.model, num_layers=1),
        checkpoint=replace(config.checkpoint, every=2),
    )
    wanted = undisturbed(1, 1, config)
    site.configure(config)
    begun = site.directory / "microbatches"
    running = site.start(imports=[site.module("counted", COUNTED)])
    running.wait_until(lambda: begun.exists() and begun.stat().st_size >= 4 * 5 + 2, poll_seconds=0.001)
    running.kill()
    running.ended()
    assert begun.stat().st_size % 4, "the step was over before the process was killed"
    site.finish()
    site.assert_same(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=["both", "first", "second"])
def test_killed_processes_of_two_end_the_other_and_both_go_on_bitwise(
    which: tuple[int, ...], undisturbed: Any, site: Site, rng: np.random.Generator
) -> None:
    wanted = undisturbed(2, 1)
    running = site.start(2, 1)
    site.until_step(running, int(rng.integers(5, 15)))
    running.kill(*which)
    assert 0 not in {process.code for process in running.ended()}
    site.finish(2, 1)
    site.assert_same(wanted)


@pytest.mark.slow
def test_one_of_two_that_is_told_to_stop_stops_both_and_they_go_on_bitwise(
    undisturbed: Any, site: Site, rng: np.random.Generator
) -> None:
    wanted = undisturbed(2, 1)
    running = site.start(2, 1)
    site.until_step(running, int(rng.integers(3, 10)))
    running.send(signal.SIGTERM, 1)
    first, second = running.ended()
    assert (first.code, second.code) == (75, 75), first.err + second.err
    [stopped] = site.events("stopped")
    assert site.saved()[-1] == stopped["step"] == site.last_step()
    site.finish(2, 1)
    # Nothing was done twice: no step is lost, and no batch was handed out that the state does not know.
    site.assert_same(wanted)
    assert len((site.directory / "handed.jsonl").read_text().splitlines()) == 2 * 24


IMPATIENT = """
import jax
initialize = jax.distributed.initialize
jax.distributed.initialize = lambda **group: initialize(**group | {"heartbeat_timeout_seconds": 5})
"""


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_other_and_both_go_on_bitwise(undisturbed: Any, site: Site) -> None:
    wanted = undisturbed(2, 1)
    running = site.start(2, 1, imports=[site.module("impatient", IMPATIENT)])
    site.until_step(running, 6)
    running.send(signal.SIGSTOP, 1)
    running.wait_until(lambda: running.processes[0].poll() is not None, of=1)
    running.kill(1)
    assert running.ended()[0].code != 0
    site.finish(2, 1)
    site.assert_same(wanted)


HANGS = """
import os, time
from hybridlm.data.pipeline import Batches
hand_out = Batches.__next__

def hang(batches):
    if batches.position == 9 and os.environ["HYBRIDLM_PROCESS_ID"] == "1":
        time.sleep(1e6)
    return hand_out(batches)

Batches.__next__ = hang
"""


@pytest.mark.slow
def test_a_step_that_never_ends_ends_both_with_their_stacks_and_they_go_on_bitwise(
    config: Config, undisturbed: Any, site: Site
) -> None:
    wanted = undisturbed(2, 1)
    ended = site.start(2, 1, "--train.hang_seconds=6", imports=[site.module("hangs", HANGS)]).ended()
    assert 0 not in {process.code for process in ended}
    assert "most recent call first" in ended[1].err and "hangs.py" in ended[1].err
    site.finish(2, 1)
    site.assert_same(wanted)
