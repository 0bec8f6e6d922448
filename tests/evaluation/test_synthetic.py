"""Runs on a synthetic task: they learn it, and `hybridlm eval` counts as a plain loop over whole logits does."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import hybridlm
from hybridlm.config import MQAR, Cosine, Data, Eval, Mesh, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.config_io import load_config, load_run_config
from hybridlm.data.synthetic.windows import windows_of_length
from hybridlm.evaluation.synthetic import cells, evaluate_task
from hybridlm.train.loop import train

STEPS = 40


@pytest.fixture(scope="module")
def parity_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's first steps, which are enough at 12 bits."""
    recipe = load_config("parity")
    task = replace(recipe.data.task, min_length=4, num_validation=50)
    config = replace(
        recipe,
        data=replace(recipe.data, task=task, seq_len=12),
        optimizer=replace(recipe.optimizer, schedule=Cosine(warmup_steps=4)),
        train=replace(recipe.train, steps=STEPS),
        eval=Eval(every=STEPS),
    )
    directory = tmp_path_factory.mktemp("runs") / "parity"
    assert train(config, directory) == 0
    return directory


def counted(run: Path, length: int) -> dict[str, float]:
    """What a report says of one length: every held-out example by itself, answers by their sums modulo two."""
    model, tokenizer, config = hybridlm.load(run)
    assert tokenizer.vocab_size == 2
    windows = windows_of_length(config.data.task, length)
    right, whole, nats = 0, 0, 0.0
    for i in range(len(windows)):
        bits = windows[i]["tokens"]
        y = np.asarray(model(jnp.asarray(bits[None]))[0][0], np.float64)
        parities = np.cumsum(bits) % 2
        matches = [int(row.argmax()) == parity for row, parity in zip(y, parities, strict=True)]
        right, whole = right + sum(matches), whole + all(matches)
        nats += sum(math.log(np.exp(row).sum()) - row[parity] for row, parity in zip(y, parities, strict=True))
    answers = len(windows) * length
    return {
        "accuracy": right / answers,
        "sequence_accuracy": whole / len(windows),
        "loss": nats / answers,
        "sequences": len(windows),
        "answers": answers,
    }


def test_parity_is_learned_and_counted(parity_run: Path, tmp_path: Path, invoke: Callable[..., Any]) -> None:
    run = shutil.copytree(parity_run, tmp_path / "run")
    before = (run / "eval.jsonl").read_text().splitlines()
    code, out, _ = invoke("eval", run, "--length", 3, 12, 30, "--json", tmp_path / "report.json")
    assert code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["step"], report["task"], report["unit"]) == (STEPS, "parity", "tokens")
    for row, length in zip(report["results"], (3, 12, 30), strict=True):
        assert row["length"] == length
        expected = counted(run, length)
        assert row == pytest.approx({"task": "parity", "length": length} | expected, rel=1e-5)
        assert f"{length:7}  {expected['accuracy']:8.3f}  {expected['sequence_accuracy']:11.3f}" in out
    assert report["results"][1]["accuracy"] > 0.95, "chance is a half"
    added = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()[len(before) :]]
    assert added == [{"step": STEPS} | row for row in report["results"]]


def test_any_mesh_counts_the_same(parity_run: Path, tmp_path: Path) -> None:
    run, config = shutil.copytree(parity_run, tmp_path / "run"), load_run_config(parity_run)
    one = evaluate_task(config, run)
    mesh = Mesh(data=1, fsdp=2, context=2, tensor=2)
    other = evaluate_task(replace(config, sharding=Sharding(mesh=mesh)), run)
    assert other["results"] == [pytest.approx(row, rel=1e-5) for row in one["results"]]


@pytest.mark.slow
def test_evaluations_of_a_task_are_none_of_the_run(parity_run: Path, tmp_path: Path) -> None:
    """Going on, a run evaluates where only `hybridlm eval` has been."""
    run = shutil.copytree(parity_run, tmp_path / "run")
    lines = (run / "eval.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [STEPS]
    (run / "eval.jsonl").write_text(json.dumps({"step": STEPS, "task": "parity", "length": 3}) + "\n")
    assert train(load_run_config(run), run) == 0
    records = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert [record.get("task") for record in records] == ["parity", None]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--length", "many"), ("--length", "many")),
        (("--length", "8", "0"), ("--length=0: must be at least 1",)),
        (("--windows", "sliding"), ("--windows: is for runs on text",)),
        (("--pairs", "4"), ("--pairs: are of mqar, and the run's task is parity",)),
        (("--context", "64"), ("--context: is for runs on text", "data.source=parity")),
        (("--data", "python-stdlib"), ("--data: is for runs on text",)),
    ],
)
def test_wrong_words_are_one_line(
    invoke: Callable[..., Any], parity_run: Path, words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    invoke("eval", parity_run, *words).assert_refused(*parts)


def test_a_task_is_no_text_to_continue(invoke: Callable[..., Any], parity_run: Path) -> None:
    invoke("generate", parity_run, "--prompt", "a").assert_refused("continues no text, its data.source is parity")


def test_a_cell_for_each_number_of_pairs_and_each_length() -> None:
    data = Data(source="mqar", task=MQAR(num_pairs=4, min_pairs=2), seq_len=32)
    found = [cell.settings for cell in cells(data, [32, 64], [3, 8])]
    assert found == [{"task": "mqar", "length": n, "num_pairs": k} for k in (3, 8) for n in (32, 64)]
    assert [cell.settings["num_pairs"] for cell in cells(data, [], [])] == [2, 4]
    assert {cell.length for cell in cells(data, [], [])} == {32}
    with pytest.raises(ConfigError, match=r"^--length=31: mqar needs at least 32"):
        list(cells(data, [31], [8]))
    with pytest.raises(ConfigError, match=r"^--pairs: data.task.vocab_size=128: half of it"):
        list(cells(data, [], [64]))
