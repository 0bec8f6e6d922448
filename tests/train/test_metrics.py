"""What a run tells: lines in a file where there is no terminal, JSON lines, TensorBoard events."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from hybridlm.train.metrics import Events, JsonLines, NoLog, Progress, RunLog


def record(step: int, **more: Any) -> dict[str, Any]:
    values = {"loss": 2.5, "bits_per_byte": 3.607, "tokens_per_second": 12345.6, "mfu": 0.4567, "step_time_s": 60.0}
    return {"step": step, "tokens": step * 100} | values | more


def test_without_a_terminal_each_record_is_one_whole_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(0, 3000)
    progress.show(record(10))
    progress.show(record(2940))
    progress.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out == (
        "step 10/3000  loss 2.5000  bits/byte 3.607  12,346 tokens/s  MFU 45.7%  ETA 2 days, 1:50:00\n"
        "step 2940/3000  loss 2.5000  bits/byte 3.607  12,346 tokens/s  MFU 45.7%  ETA 1:00:00\n"
    )


def test_on_a_terminal_a_bar_shows_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = Progress(5, 20)
    progress.show(record(10))
    progress.say("a line above the bar")
    progress.close()
    out, err = capsys.readouterr()
    assert out == "a line above the bar\n"
    assert "10/20" in err
    assert "loss 2.5000" in err


def test_choices_of_experts_that_are_dropped_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = {"step": 20, "loss": 1.75, "perplexity": 5.75, "bits_per_byte": 2.5, "tokens": 7}
    with RunLog(tmp_path, 0, 20) as log:
        for share in (0.0125, 0.0):
            log.train(record(10, **{"aux/moe_dropped": share}))
            log.eval(held_out | {"moe_dropped": share})
    some, some_held_out, none, none_held_out = capsys.readouterr().out.splitlines()
    assert "MFU 45.7%  dropped 1.25%  ETA" in some
    assert some_held_out.endswith("(7 tokens), 1.25% of choices dropped")
    assert "dropped" not in none + none_held_out


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "grad_norm": null, "lr": 0.5}\n'


def test_lines_after_a_step_are_dropped(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3, 4):
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines.keep_until(2)
    lines.append({"step": 3})
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3]


def test_events_survive_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    Events(tmp_path).add("saved", 4, bytes=7)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "rolled b')
    Events(tmp_path).add("skipped", 6, batch=5, reason="not finite")
    first, second = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    assert (first["event"], first["step"], first["bytes"]) == ("saved", 4, 7)
    assert (second["event"], second["step"], second["batch"]) == ("skipped", 6, 5)
    assert second["time"].startswith("20")


def test_other_processes_write_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Events(None).add("saved", 4)
    with NoLog() as log:
        log.train(record(1))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is opened to add to it goes to a device that has no room."""
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", *a, **b: opened(Path("/dev/full") if mode == "a" else self, mode, *a, **b)
    )


def test_a_line_that_finds_no_room_is_an_error_that_names_the_file(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OSError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        JsonLines(tmp_path / "metrics.jsonl").append(record(1))


def test_tensorboard_events_that_find_no_room_are_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: Any, *told: Any) -> None:
        raise OSError(28, "No space left on device")

    # Many more than a queue would take: nobody waits for a thread that has died.
    with pytest.raises(OSError, match="No space left"), RunLog(tmp_path, 0, 20) as log:
        monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", no_room)
        monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.flush", no_room)
        for step in range(1, 100):
            log.train(record(step))


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, from the TFRecord file: length, its checksum, an Event, its checksum."""
    (path,) = directory.iterdir()
    data, found = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_events_hold_every_number(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 20) as log:
        log.train(record(10))
        log.train(record(20, loss=1.5))
        log.eval({"step": 20, "loss": 1.75, "perplexity": 5.75, "bits_per_byte": 2.5, "tokens": 7, "by_position": []})
        assert log.evaluated(20)
        assert not log.evaluated(10)
    events = scalars(tmp_path / "tensorboard")
    assert {"train/tokens_per_second", "train/mfu", "train/tokens", "eval/bits_per_byte"} <= set(events)
    assert events["train/loss"] == [(10, 2.5), (20, 1.5)]
    assert events["eval/loss"] == [(20, 1.75)]


def test_pytorch_is_left_where_it_is(process_environment: dict[str, str]) -> None:
    """tensorboardX would import it."""
    pytest.importorskip("torch")
    program = "import sys, hybridlm.run; print('tensorboardX' in sys.modules, 'torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, env=process_environment, capture_output=True, text=True).stdout == "True False\n"
