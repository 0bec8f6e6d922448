"""Runs that go on with other processes, other devices or another mesh than they died with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm.config import Config, Mesh, Sharding
from hybridlm.sharding import make_mesh
from hybridlm.train import loop
from tests.faults.history import assert_same, history
from tests.faults.sites import Site

TOLERANCE = 1e-6
"""Relative, of float32 losses and arrays: other devices take their sums in another order."""
AS_OFTEN = 4e-6
"""The same where it changed several times."""


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(Mesh(data=1, fsdp=4), id="fsdp"),
        pytest.param(Mesh(data=2, tensor=2), id="tensor", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_another_mesh(
    mesh: Mesh, died: Path, done: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two devices had copies of everything; four have a share of it."""
    monkeypatch.setattr(loop, "run_mesh", lambda config: make_mesh(config.sharding.mesh, jax.devices()[:4]))
    assert loop.train(replace(config, sharding=Sharding(mesh=mesh)), died) == 0
    assert_same(history(died), history(done), rtol=TOLERANCE)


@pytest.mark.slow
def test_two_hosts_become_one_and_two_again(undisturbed: Any, site: Site) -> None:
    """Each of them is killed; the batches stay the same, row by row."""
    wanted = undisturbed(1, 2)
    for processes, devices, step in ((2, 1, 6), (1, 2, 13)):
        running = site.start(processes, devices)
        site.until_step(running, step)
        running.wait_until(lambda: 4 in site.saved())  # which goes on beside the steps
        running.kill()
        running.ended()
    site.finish(2, 1)
    assert len(site.events("restored")) == 2
    site.assert_same(wanted, rtol=AS_OFTEN)


IMPATIENT = """
from dataclasses import replace
from hybridlm import distributed
described = distributed.group_of
distributed.group_of = lambda environment: replace(described(environment), start_seconds=4)
"""


@pytest.mark.slow
def test_a_host_that_is_missing_on_restart_is_said_and_costs_nothing(undisturbed: Any, site: Site) -> None:
    wanted = undisturbed(2, 1)
    running = site.start(2, 1)
    site.until_step(running, 6)
    running.kill()
    running.ended()
    kept = {path: path.read_bytes() for path in (site.run / "checkpoints").rglob("*") if path.is_file()}

    running = site.start(2, 1, imports=[site.module("impatient", IMPATIENT)])
    running.kill(1)
    first, _ = running.ended()
    assert first.code == 1
    assert first.err.count("\n") == 1 and "after 4 s not all are there" in first.err
    assert all(path.read_bytes() == content for path, content in kept.items())

    site.finish(2, 1)
    site.assert_same(wanted)
