"""The report as a reader of it finds it: everything is checked on the HTML, against the files that it was made of."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybridlm.config import MoE
from hybridlm.report.page import write_report
from tests.report.conftest import WriteRun, as_lines, config_of, held_out_of, records_of
from tests.report.document import Element, chart_of, line_of, parse, points_of, ticks_of

STEPS = range(2, 41, 2)


def report_of(*runs: Path, plan: Path | None = None) -> Element:
    out = runs[0].parent / "report.html"
    write_report(runs, out, plan)
    return parse(out.read_text(encoding="utf-8"))


def values_seen(figure: Element, name: str, kind: str = "line") -> tuple[np.ndarray, np.ndarray, float]:
    """What a reader sees of a line on linear axes: x and y by the labelled ticks, and y per pixel."""
    (x0, px0), *_, (x1, px1) = ticks_of(figure)[0]
    (y0, py0), *_, (y1, py1) = ticks_of(figure)[1]
    pixels = np.array(points_of(line_of(figure, name), kind))
    unit = (y1 - y0) / (py1 - py0)
    return x0 + (pixels[:, 0] - px0) * (x1 - x0) / (px1 - px0), y0 + (pixels[:, 1] - py0) * unit, abs(unit)


@pytest.mark.parametrize(
    ("title", "name", "line"),
    [
        ("Loss", "loss", "training"),
        ("Bits per byte", "bits_per_byte", "training"),
        ("Learning rate", "lr", "lr"),
        ("Tokens per second", "tokens_per_second", "tokens_per_second"),
        ("MFU", "mfu", "mfu"),
        ("Load of the busiest expert", "aux/moe_max_load", "aux/moe_max_load"),
    ],
)
def test_lines_are_the_metrics(write_run: WriteRun, title: str, name: str, line: str) -> None:
    document = report_of(write_run(metrics=records_of(STEPS), eval=held_out_of([20, 40])))
    steps, values, unit = values_seen(chart_of(document, title), line)
    np.testing.assert_allclose(steps, STEPS, atol=0.02)
    # Points have one decimal of a pixel, and so have the ticks that they are read by.
    np.testing.assert_allclose(values, [record[name] for record in records_of(STEPS)], atol=0.3 * unit)


def test_held_out_losses_are_those_of_the_file(write_run: WriteRun) -> None:
    document = report_of(write_run(eval=held_out_of([20, 40])))
    steps, values, unit = values_seen(chart_of(document, "Loss"), "held out")
    np.testing.assert_allclose(steps, [20, 40], atol=0.02)
    np.testing.assert_allclose(values, [2.4, 2.0], atol=0.3 * unit)


def test_nothing_is_loaded_and_nothing_needs_a_script(write_run: WriteRun) -> None:
    run = write_run(eval=held_out_of([20, 40]), environment={"command": ["hybridlm", "train"]})
    document = report_of(run)
    text = (run.parent / "report.html").read_text()
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    loading = {"src", "href", "srcset", "data", "action"}
    assert not [name for name in loading for element in every(document) if name in element.attributes]
    assert not list(document.all("link")) and not list(document.all("img"))
    (script,) = document.all("script")
    assert "innerHTML" not in script.text and "fetch" not in script.text
    for figure in document.all("figure", "chart"):
        assert list(figure.all("polyline")) or list(figure.all("circle"))


def every(element: Element) -> list[Element]:
    below = [child for child in element.children if isinstance(child, Element)]
    return [*below, *(each for child in below for each in every(child))]


def test_every_chart_says_what_it_shows_and_has_a_table(write_run: WriteRun) -> None:
    document = report_of(write_run(eval=held_out_of([20, 40])))
    figures = list(document.all("figure", "chart"))
    assert len(figures) >= 8
    for figure in figures:
        svg = figure.one("svg")
        assert svg.attributes["role"] == "img" and svg.one("title").text and svg.one("desc").text.endswith(".")
        assert figure.one("details").one("table").rows()[1:]
    (_, *rows) = chart_of(document, "Learning rate").one("table").rows()
    assert [row[0] for row in rows] == [str(step) for step in STEPS]
    assert rows[-1][1] == "0.003"


def test_what_a_model_writes_is_text(write_run: WriteRun) -> None:
    bad = '</pre><script>alert("1")</script>\x00\x1b[2J & \ud800 \u202e'
    config = replace(config_of(), data=replace(config_of().data, source="text", path="<b>&'\".txt"))
    run = write_run(
        "<i>run",
        config,
        samples=[{"step": 40, "prompt": "<u>", "text": bad}],
        eval=[*held_out_of([40]), {"step": 40, "task": "<em>task", "<s>acc": 0.5}],
        events=[{"step": 1, "event": "<q>", "time": "now", "reason": "<q>"}],
        environment={"command": ["<q>"], "devices": ["<q>"], "packages": {"<q>": "<q>"}, "parameters": {"<q>": 5}},
    )
    document = report_of(run)
    assert len(list(document.all("script"))) == 1
    assert not [
        tag for tag in ("i", "u", "em", "s", "q") for found in document.all(tag) if "class" not in found.attributes
    ]
    (shown,) = document.all("pre")
    assert shown.text == '<u></pre><script>alert("1")</script>\u2400\u241b[2J & ? \u202e'
    assert "<b>&'\".txt" in document.one("main").text
    assert "<em>task" in [heading.text for heading in document.all("h3")]


def test_of_earlier_samples_the_latest_is_shown(write_run: WriteRun) -> None:
    samples = [{"step": step, "prompt": "a", "text": f" at {step}"} for step in (10, 20, 40)]
    (sample,) = report_of(write_run(samples=samples)).all("div", "sample")
    assert [pre.text for pre in sample.all("pre")] == ["a at 40", "a at 20", "a at 10"]
    assert [pre.text for pre in sample.one("details").all("pre")] == ["a at 20", "a at 10"]


def test_half_a_last_line_is_left_out(write_run: WriteRun) -> None:
    whole = as_lines(records_of(STEPS))
    cut = whole + json.dumps(records_of([42])[0])[:70]
    assert str(report_of(write_run("cut", metrics=cut)).one("main")).replace("cut", "") == str(
        report_of(write_run("whole", metrics=whole)).one("main")
    ).replace("whole", "")


def test_steps_that_were_run_again_count_once(write_run: WriteRun) -> None:
    again = [record | {"loss": 9.0} for record in records_of(range(22, 31, 2))]
    events = [{"event": "started", "step": 0, "time": ""}, {"event": "restored", "step": 20, "time": ""}]
    document = report_of(write_run(metrics=[*records_of(STEPS), *again], events=events))
    figure = chart_of(document, "Loss")
    steps, values, unit = values_seen(figure, "training")
    np.testing.assert_allclose(steps, range(2, 31, 2), atol=0.02)
    np.testing.assert_allclose(values[-5:], 9.0, atol=0.3 * unit)
    (mark,) = figure.all("line", "mark")
    (x0, px0), *_, (x1, px1) = ticks_of(figure)[0]
    assert float(mark.attributes["x1"]) == pytest.approx(px0 + (20 - x0) * (px1 - px0) / (x1 - x0), abs=0.1)
    assert "restored" in [row[1] for row in document_table(document, "What happened").rows()]


def document_table(document: Element, title: str) -> Element:
    return next(s for s in document.all("section") if s.one("h2").text == title).one("table")


def test_a_value_that_is_not_finite_is_a_gap_and_is_told(write_run: WriteRun) -> None:
    records = records_of(STEPS)
    for record in records[5:8]:
        record |= {"loss": None, "nonfinite_total": 3}
    records[-1]["nonfinite_total"] = 3
    document = report_of(write_run(metrics=as_lines(records).replace('"lr": 0.003', '"lr": NaN')))
    group = line_of(chart_of(document, "Loss"), "training")
    assert [len(line.attributes["points"].split()) for line in group.all("polyline")] == [5, 12]
    assert "3 steps were rejected" in document.one("p", "warning").text
    assert "at 3 of 20 records" in chart_of(document, "Loss").one("desc").text


def test_a_run_that_has_just_begun_has_a_report(write_run: WriteRun) -> None:
    run = write_run(metrics="")
    document = report_of(run)
    assert document.one("p", "status").text == "No step of 40 has been logged yet."
    assert not list(document.all("figure", "chart"))
    assert "What was trained" in [heading.text for heading in document.all("h2")]
    (run / "metrics.jsonl").unlink()  # as where its first step failed
    assert str(report_of(run)) == str(document)
    compared = report_of(write_run("a"), run)
    assert [details.one("summary").text for details in compared.all("details", "run")] == ["a", "a_run"]


def test_how_far_a_run_is(write_run: WriteRun) -> None:
    stopped = {"event": "stopped", "step": 33, "time": "", "reason": "request"}
    saved = {"event": "saved", "step": 36, "time": "", "bytes": 2000}
    metrics = records_of(range(2, 33, 2))
    told = {}
    for name, events in {"a": [saved], "b": [saved, stopped], "c": []}.items():
        told[name] = report_of(write_run(name, metrics=metrics, events=events)).one("p", "status").text
    assert told == {"a": "Step 36 of 40.", "b": "Step 33 of 40, stopped (request).", "c": "Step 32 of 40."}
    assert report_of(write_run("d")).one("p", "status").text == "All 40 steps are done."


def test_one_record_is_a_dot(write_run: WriteRun) -> None:
    document = report_of(write_run(metrics=records_of([2])))
    group = line_of(chart_of(document, "Loss"), "training")
    assert not list(group.all("polyline")) and len(list(group.all("circle"))) == 1


def test_long_runs_keep_their_extremes_and_stay_small(write_run: WriteRun) -> None:
    """Of 100,000 records, in each of which all but the learning rate differ."""
    names, count = ("loss", "bits_per_byte", "grad_norm", "tokens_per_second", "mfu", "step_time_s"), 100_000
    values = np.random.default_rng(3).normal(3.0, 0.1, (len(names), count))
    values[0, [12_345, 23_456]] = 9.0, 0.5
    record = {"step": "%d", "lr": 0.003} | {name: "%.6f" for name in names}
    line = json.dumps(record).replace('"%d"', "%d").replace('"%.6f"', "%.6f") + "\n"
    lines = [line % (step, *row) for step, row in enumerate(values.T.tolist(), 1)]
    alone = "".join(f'{{"step": {step}, "loss": {value}}}\n' for step, value in enumerate(values[0, :30_000], 1))

    def size_of(run: Path) -> int:
        report_of(run)
        return (run.parent / "report.html").stat().st_size

    shorter = config_of(steps=30_000)
    assert size_of(write_run("loss_alone", config=shorter, metrics=alone)) < 100_000
    size_of_shorter = size_of(write_run("shorter", config=shorter, metrics="".join(lines[:30_000])))
    run = write_run(config=config_of(steps=count), metrics="".join(lines))
    figure = chart_of(report_of(run), "Loss")
    _, values, unit = values_seen(figure, "training", "raw")
    assert (values.max(), values.min()) == (pytest.approx(9.0, abs=unit), pytest.approx(0.5, abs=unit))
    assert len(values) <= 4 * 422
    means = values_seen(figure, "training", "mean")[1]
    assert np.all(np.abs(means - 3.0) < 0.1)
    assert size_of(run) < min(400_000, 1.02 * size_of_shorter)


def test_overview_is_of_config_and_environment(write_run: WriteRun) -> None:
    environment = {
        "devices": ["TPU v5p"] * 8,
        "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
        "processes": 2,
        "parameters": {"embedding": 4000, "RGLRU": 6000},
        "idle_parameters": 1000,
    }
    document = report_of(write_run(eval=held_out_of([40]), environment=environment))
    facts = document.one("dl", "facts")
    told = dict(zip([dt.text for dt in facts.all("dt")], [dd.text for dd in facts.all("dd")], strict=True))
    assert told["devices"] == "8 × TPU v5p; mesh data 2, fsdp 4; 2 processes"
    assert told["layers"] == "5 layers RGLRU + GeGLU Attention 8 + GeGLU × 2, and the first 1 again"
    assert told["steps"] == "40 of 4 × 32 = 128 tokens; 5,120 in all"
    tiles = document.one("dl", "tiles")
    first = dict(zip([dt.text for dt in tiles.all("dt")], [dd.text for dd in tiles.all("dd")], strict=True))
    assert first["held-out bits per byte"] == "2.8" and first["parameters"] == "10.0 k" and first["tokens"] == "5.12 k"
    median = np.median([record["mfu"] for record in records_of(STEPS)])
    assert first["MFU"] == f"{100 * median:.1f} %"
    rows = document.one("figure", "shares").one("table").rows()
    assert rows[1:] == [["RGLRU", "6,000", "60.0 %"], ["embedding", "4,000", "40.0 %"]]
    assert "10,000 parameters, 9,000 of them active for a token" in document.text


def test_goodput_names_its_losses(write_run: WriteRun) -> None:
    seconds = {"steps": 60.0, "compile": 30.0, "lost": 10.0, "save": 0.0}
    document = report_of(write_run(goodput={"seconds": seconds, "furthest": 40, "as_of": 0.0}))
    rows = document_table(document, "Where the time went").rows()
    assert rows[1:] == [
        ["steps", "1 min", "60.0 %"],
        ["compiling", "30 s", "30.0 %"],
        ["steps run again", "10 s", "10.0 %"],
    ]


def test_sources_have_their_share(write_run: WriteRun) -> None:
    section = next(s for s in report_of(write_run()).all("section") if s.one("h2").text == "Data")
    *_, rows = (table.rows() for table in section.all("table"))
    assert rows[1:] == [["code", "3,840", "75.0 %", "0.04"], ["docs", "1,280", "25.0 %", "0.4"]]


def test_every_task_has_a_table(write_run: WriteRun) -> None:
    evals = [
        *held_out_of([20, 40]),
        {"step": 20, "task": "recall", "accuracy": 0.25, "kind": "text"},
        {"step": 40, "task": "recall", "accuracy": 0.5, "kind": "text"},
        {"step": 40, "task": "copying", "accuracy": None, "num": 12},
    ]
    document = report_of(write_run(eval=evals))
    section = next(s for s in document.all("section") if s.one("h2").text == "Evaluations")
    tables = dict(zip([h.text for h in section.all("h3")], [t.rows() for t in section.all("table")], strict=True))
    assert tables["recall"] == [["step", "accuracy"], ["20", "0.25"], ["40", "0.5"]]
    assert tables["copying"] == [["step", "num"], ["40", "12"]]
    assert [row[:2] for row in tables["Held-out text"][1:]] == [["20", "2.4"], ["40", "2"]]
    assert len(list(line_of(chart_of(document, "Loss"), "held out").all("circle"))) == 2


def test_unknown_metrics_are_shown_too(write_run: WriteRun) -> None:
    records = [record | {"state_norm": 3.0, "aux/novel_thing": 2.0} for record in records_of(STEPS)]
    document = report_of(write_run(metrics=records))
    assert chart_of(document, "state norm") and chart_of(document, "novel thing")
    assert "Recurrent states" in [heading.text for heading in document.all("h2")]


def test_norms_of_states_are_those_of_the_last_evaluation(write_run: WriteRun) -> None:
    lengths, norms = [32, 64, 128, 160], [2.0, 3.0, 5.0, 4.0]
    rows = [{"length": n, "loss": 1.0, "layer 0": norm, "layer 2": 1.0} for n, norm in zip(lengths, norms, strict=True)]
    older = {"step": 20, "task": "collapse", "by_length": [row | {"layer 0": 9.0} for row in rows]}
    document = report_of(write_run(eval=[older, {"step": 40, "task": "collapse", "by_length": rows}]))
    figure = chart_of(document, "Norm of the recurrent state")
    assert figure.one("p").text == "in a text read at a stretch, at step 40"
    table = [["length", "layer 0", "layer 2"], ["32", "2", "1"], ["64", "3", "1"], ["128", "5", "1"], ["160", "4", "1"]]
    assert figure.one("table").rows() == table


def test_two_runs_are_compared(write_run: WriteRun) -> None:
    other = config_of(batch_size=8)
    wider = replace(other.model.pattern[1], ffn=MoE(num_experts=4, hidden=8))
    other = replace(other, model=replace(other.model, pattern=(other.model.pattern[0], wider)))
    a = write_run("a", eval=held_out_of([20, 40]))
    evals = [record | {"loss": 1.0, "bits_per_byte": 1.5} for record in held_out_of([20])]
    faster = [record | {"tokens": 2 * record["tokens"]} for record in records_of(STEPS, seed=1)]
    b = write_run("b", other, metrics=faster, eval=[*evals, {"task": "t", "step": 9, "acc": 0.5}])
    document = report_of(a, b)

    final = {row[0]: row[1:] for row in document_table(document, "Final numbers").rows()}
    assert final["held-out bits per byte"] == ["2.8", "1.5"]
    assert final["tokens"] == ["5.12 k", "10.2 k"]
    bold = [cell.text for cell in document_table(document, "Final numbers").all("b")]
    assert "1.5" in bold and "2.8" not in bold

    assert document_table(document, "Configs").rows()[1:] == [
        ["model.pattern.1.ffn", "GeGLU", "MoE"],
        ["train.batch_size", "4", "8"],
    ]
    by_step, by_tokens = chart_of(document, "Training loss"), chart_of(document, "Training loss", 1)
    for name, records in {"a": records_of(STEPS), "b": faster}.items():
        for figure, x in ((by_step, "step"), (by_tokens, "tokens")):
            places, values, unit = values_seen(figure, name)
            np.testing.assert_allclose(
                places, [record[x] for record in records], rtol=1e-3, atol=0.002 * records[-1][x]
            )
            np.testing.assert_allclose(values, [record["loss"] for record in records], atol=0.3 * unit)
    held_out, _, _ = values_seen(chart_of(document, "Bits per byte", 1), "a")
    np.testing.assert_allclose(held_out, [20 * 128, 40 * 128], rtol=1e-2)
    assert document_table(document, "Evaluations").rows()[1:] == [["a", "–", "–"], ["b", "9", "0.5"]]
    assert [details.one("summary").text for details in document.all("details", "run")] == ["a", "b"]


def test_runs_of_one_name_go_by_their_paths(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    runs = write_run("x/a"), write_run("y/a")
    names = [details.one("summary").text for details in report_of(*runs).all("details", "run")]
    assert names == [str(run) for run in runs]


def test_ids_are_unique(write_run: WriteRun) -> None:
    document = report_of(write_run("a", eval=held_out_of([40])), write_run("b", eval=held_out_of([40])))
    ids = [element.attributes["id"] for element in every(document) if "id" in element.attributes]
    assert len(ids) == len(set(ids)) > 10


def test_the_same_runs_make_the_same_file(write_run: WriteRun, tmp_path: Path) -> None:
    run = write_run(eval=held_out_of([20, 40]))
    pages = []
    for name in ("first.html", "second.html"):
        write_report([run], tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]
    assert not list(tmp_path.glob(".*.tmp"))


PLAN = {
    "topology": "v5e:2x2",
    "device_kind": "TPU v5e",
    "num_devices": 4,
    "tokens": 1000,
    "fits": True,
    "needed_bytes": 8e9,
    "available_bytes": 16e9,
    "memory": {"parameters": 6e9, "optimizer": 0, "batch": 0, "activations": 2e9, "temporaries": 0, "code": 0},
    "costs": {"ffn": {"flops": 3e9, "hbm_bytes": 1e6}, "mixer": {"flops": 1e9, "hbm_bytes": 2e6}},
    "collectives": [{"kind": "all-gather", "axes": ["fsdp"], "scope": "ffn", "runs": 4, "bytes": 1024}],
    "estimate": {"step_s_overlapped": 0.01, "step_s_serial": 0.02, "mfu_overlapped": 0.4, "mfu_serial": 0.2},
}


@pytest.mark.parametrize("searched", [False, True])
def test_a_plan_stands_beside_what_was_measured(write_run: WriteRun, tmp_path: Path, searched: bool) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"ranked": [{"flags": "", "report": PLAN}]} if searched else PLAN))
    document = report_of(write_run(), plan=path)
    section = next(s for s in document.all("section") if s.one("h2").text == "Plan")
    assert "On v5e:2x2 (4 × TPU v5e) the step fits: 8 GB of 16 GB on each device." in section.text
    memory, time, work, collectives = (table.rows() for table in section.all("table"))
    assert memory[1:] == [["parameters", "6 GB", "75.0 %"], ["activations", "2 GB", "25.0 %"]]
    assert time[2][:3] == ["tokens per second", "100 k", "50.0 k"] and time[3][:3] == ["MFU", "40.0 %", "20.0 %"]
    assert time[1][3] == f"{1000 * np.median([128 / r['tokens_per_second'] for r in records_of(STEPS)]):.3g} ms"
    assert work[1] == ["ffn", "3.00 B", "75.0 %", "1 MB"]
    assert collectives[1] == ["all-gather", "fsdp", "ffn", "4", "1.02 kB"]


def test_a_plan_in_the_run_is_found(write_run: WriteRun) -> None:
    assert "On v5e:2x2" in report_of(write_run(plan=PLAN)).text


def test_colours_can_be_read_on_their_paper() -> None:
    from hybridlm.report.style import DARK, LIGHT

    def luminance(colour: str) -> float:
        channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for colours in (LIGHT, DARK):
        for name in colours.keys() - {"paper", "panel", "rule"}:
            for paper in ("paper", "panel"):
                bright, dark = sorted((luminance(colours[name]), luminance(colours[paper])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, f"{name} on {paper}"


def test_large_and_small_values_have_a_logarithmic_axis(write_run: WriteRun) -> None:
    norms = [10.0 ** (n % 7 - 3) for n in range(len(STEPS))]
    records = [record | {"grad_norm": norm} for record, norm in zip(records_of(STEPS), norms, strict=True)]
    figure = chart_of(report_of(write_run(metrics=records)), "Gradient norm")
    ticks = ticks_of(figure)[1]
    (y0, py0), *_, (y1, py1) = [(math.log(value), pixel) for value, pixel in ticks]
    pixels = np.array(points_of(line_of(figure, "grad_norm")))[:, 1]
    found = np.exp(y0 + (pixels - py0) * (y1 - y0) / (py1 - py0))
    np.testing.assert_allclose(found, norms, rtol=0.03)
