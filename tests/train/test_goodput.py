"""Where a run's time goes, on clocks that the tests set."""

import json
from pathlib import Path

import pytest

from hybridlm.train.goodput import Goodput


class Clocks:
    """A process' monotonic clock and the wall's."""

    def __init__(self) -> None:
        self.uptime, self.wall = 1000.0, 5000.0

    def pass_(self, seconds: float) -> None:
        self.uptime += seconds
        self.wall += seconds

    def new_process(self, path: Path | None) -> Goodput:
        self.uptime = 7.0  # another machine: nothing follows from its monotonic clock
        return Goodput(path, monotonic=lambda: self.uptime, wall=lambda: self.wall)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_every_second_is_of_one_kind(clocks: Clocks) -> None:
    goodput = clocks.new_process(None)
    clocks.pass_(3)  # start-up
    with goodput.spent("compile"):
        clocks.pass_(5)
    goodput.step(1)
    clocks.pass_(10)
    with goodput.spent("evaluation"):
        clocks.pass_(2)
        with goodput.spent("save"):
            clocks.pass_(1)
        clocks.pass_(2)
    goodput.step(2)
    clocks.pass_(4)
    goodput.move(1.5, "data")
    assert goodput.fraction() == (10 + 4 - 1.5) / 27
    assert {kind: seconds for kind, seconds in goodput.seconds.items() if seconds} == {
        "start": 3,
        "compile": 5,
        "steps": 12.5,
        "evaluation": 4,
        "save": 1,
        "data": 1.5,
    }


def test_steps_run_again_are_lost(clocks: Clocks) -> None:
    goodput = clocks.new_process(None)
    for step in (1, 2, 3, 2, 3, 4):
        goodput.step(step)
        clocks.pass_(1)
    assert goodput.fraction() == 4 / 6
    assert goodput.seconds["lost"] == 2


def test_totals_go_on_over_restarts_and_the_gap_is_counted(clocks: Clocks, tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    with clocks.new_process(path) as goodput:
        goodput.step(1)
        clocks.pass_(6)
        goodput.step(2)
        clocks.pass_(2)
    clocks.pass_(30)
    goodput = clocks.new_process(path)
    clocks.pass_(2)
    goodput.step(2)  # once more
    clocks.pass_(5)
    goodput.step(3)
    clocks.pass_(5)
    assert goodput.fraction() == (8 + 5) / 50
    assert goodput.text() == "goodput 26.0% of 50 s; between processes 60.0%, steps run again 10.0%, start-up 4.0%"


def test_a_clock_that_steps_back_costs_nothing(clocks: Clocks, tmp_path: Path) -> None:
    with clocks.new_process(tmp_path / "goodput.json") as goodput:
        goodput.step(1)
        clocks.pass_(6)
    clocks.wall -= 3600
    goodput = clocks.new_process(tmp_path / "goodput.json")
    assert goodput.seconds["down"] == 0
    assert goodput.fraction() == 1


def test_totals_are_written_now_and_then(clocks: Clocks, tmp_path: Path) -> None:
    path = tmp_path / "goodput.json"
    goodput = clocks.new_process(path)
    goodput.step(1)
    clocks.pass_(0.5)
    goodput.write()
    assert not path.exists()
    clocks.pass_(0.5)
    goodput.write()
    assert json.loads(path.read_text())["seconds"]["steps"] == 1


def test_a_file_emptied_by_a_power_failure_is_begun_anew(clocks: Clocks, tmp_path: Path) -> None:
    (tmp_path / "goodput.json").write_text("")
    assert clocks.new_process(tmp_path / "goodput.json").furthest == 0


def test_a_run_that_was_refused_counts_for_nothing(clocks: Clocks, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), clocks.new_process(tmp_path / "goodput.json"):
        raise ValueError("no")
    assert not (tmp_path / "goodput.json").exists()
