"""`hybridlm report` on the command line: where it writes, and how it refuses."""

from pathlib import Path

import pytest

from hybridlm import cli
from hybridlm.config_check import ConfigError
from tests.report.conftest import WriteRun, held_out_of


def test_a_run_holds_its_report(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(eval=held_out_of([40]))
    assert cli.run(["report", str(run)]) == 0
    assert capsys.readouterr().out.startswith(f"{run}/report.html: a_run at step 40; ")
    assert (run / "report.html").read_text().startswith("<!doctype html>")


def test_several_runs_are_reported_here(write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [str(write_run("a")), str(write_run("b"))]
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", *runs]) == 0
    assert (tmp_path / "report.html").exists()
    assert cli.run(["report", *runs, "--out", "both.html"]) == 0
    assert (tmp_path / "both.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def refusal(*words: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        cli.run(["report", *map(str, words)])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_run_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    assert "no such run directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json" in refusal(tmp_path / "empty")


def test_what_cannot_be_done_is_refused(write_run: WriteRun, tmp_path: Path) -> None:
    run, other = write_run("a"), write_run("b")
    assert "no directory" in refusal(run, "--out", tmp_path / "nowhere/report.html")
    assert "is a directory" in refusal(run, "--out", tmp_path)
    assert "cannot be read" in refusal(run, "--plan", tmp_path / "nowhere.json")
    assert "is no plan" in refusal(run, "--plan", run / "config.json")
    assert "is about one run, not 2" in refusal(run, other, "--plan", run / "config.json")
    assert "is named twice" in refusal(run, run)
    assert "has no config to set fields of" in refusal(run, "--train.steps=3")
    (run / "plan.json").write_text("{")
    assert "is no plan" in refusal(run)


def test_a_directory_that_nobody_can_write_to_is_refused(write_run: WriteRun) -> None:
    """Not even root can in /proc."""
    if not Path("/proc/self").is_dir():
        pytest.skip("this system has no directory that refuses root")
    assert "cannot be written" in refusal(write_run(), "--out", "/proc/self/report.html")


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run()
    cli.run(["report", str(run)])
    before = (run / "report.html").read_bytes()

    def full(self: Path, text: str, **_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left on device" in refusal(run)
    assert (run / "report.html").read_bytes() == before
