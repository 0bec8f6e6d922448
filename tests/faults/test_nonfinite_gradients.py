"""Gradients that are NaN, once or for ever, in a run that is killed besides."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hybridlm.config import Config
from tests.faults.sites import Site
from tests.processes import Start

pytestmark = pytest.mark.slow
BLOCK = "tests.faults.poisoned"
"""Imported by the runs alone: in this process its block would be one of those that other tests go through."""

NEVER = 98, 99
"""Behind the last step. Without any such steps the program would be another one, and round otherwise."""

Poisonable = Callable[..., Site]


@pytest.fixture
def poisonable(config: Config, start: Start, tmp_path: Path) -> Poisonable:
    """`poisonable(name, first, last)`: a run of a block whose gradients are NaN in these steps.

    Three rejected steps in a row are too many, and it goes back once.
    """

    def make(name: str, *steps: int) -> Site:
        (tmp_path / name).mkdir()
        train = replace(config.train, max_nonfinite_steps=3, rollbacks=1)
        site = Site(tmp_path / name, replace(config, train=train), start)
        path = site.directory / "config.json"
        path.write_text(path.read_text().replace('"GeGLU"', '"Poisoned"'))
        poison(site, *steps)
        return site

    return make


def poison(site: Site, first: int, last: int) -> None:
    (site.directory / "poison.json").write_text(json.dumps({"first": first, "last": last}))


def test_a_bad_step_is_rejected_and_a_run_killed_behind_it_goes_on_bitwise(poisonable: Poisonable) -> None:
    wanted, site = poisonable("undisturbed", 10, 10), poisonable("killed", 10, 10)
    wanted.finish(imports=[BLOCK])
    site.kill_behind(11, imports=[BLOCK])
    site.finish(imports=[BLOCK])
    site.assert_same(wanted)
    for run in (wanted, site):
        assert {(event["step"], event["batch"]) for event in run.events("skipped")} == {(10, 9)}
    steps = site.history().steps
    assert all(record["loss"] is not None for record in steps.values())  # it is the gradients that are NaN
    assert [record["nonfinite_total"] for record in steps.values()] == [0] * 9 + [1] * 15


def test_a_run_that_is_poisoned_for_ever_stops_and_healed_goes_on_bitwise(poisonable: Poisonable) -> None:
    wanted, site = poisonable("undisturbed", *NEVER), poisonable("poisoned", 10, 99)
    wanted.finish(imports=[BLOCK])
    [ended] = site.start(imports=[BLOCK]).ended()
    assert ended.code == 1
    assert ended.err.count("\n") == 1 and "gradient was not finite 3 times in a row" in ended.err
    [back] = site.events("rolled back")
    assert (back["step"], back["rejected"], back["batches"]) == (8, [10, 12], [9, 11])
    assert site.saved() == [4, 8]

    poison(site, *NEVER)
    site.finish(imports=[BLOCK])
    site.assert_same(wanted)
