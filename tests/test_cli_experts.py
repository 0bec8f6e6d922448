"""The commands about experts: `experts`, `upcycle`, `prune`, and `generate` with experts in host memory."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hybridlm
from hybridlm import cli, config, config_io
from hybridlm.config import Config
from hybridlm.evaluation.perplexity import evaluate_run
from hybridlm.model import build
from hybridlm.model.by_layer import drawn, layers_of
from hybridlm.train.derived import read_params

Invoke = Callable[..., Any]


@pytest.fixture(scope="module")
def sparse_config(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_config` with three experts for each of its MLPs, as a file."""
    moe = config.MoE(num_experts=3, hidden=32, router=config.TopK(k=2, bias_balance=True), activation="GeGLU")
    blocks = tuple(replace(b, ffn=None if b.ffn is None else moe) for b in tiny_config.model.pattern)
    path = tmp_path_factory.mktemp("configs") / "sparse.json"
    config_io.dump_json(replace(tiny_config, model=replace(tiny_config.model, pattern=blocks)), path)
    return path


@pytest.fixture(scope="module")
def upcycled(trained_run: Path, sparse_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run upcycled from `trained_run`. Copy it to change it."""
    out = tmp_path_factory.mktemp("upcycled") / "run"
    assert cli.run(["upcycle", str(trained_run), str(sparse_config), "--out", str(out)]) == 0
    return out


def test_an_upcycled_run_is_as_good_as_the_dense_one(upcycled: Path, trained_run: Path) -> None:
    dense, sparse = (
        evaluate_run(config_io.load_run_config(run), run, data_spec=None) for run in (trained_run, upcycled)
    )
    assert sparse["step"] == 0
    assert sparse["loss"] == pytest.approx(dense["loss"], rel=1e-5)
    origin = json.loads((upcycled / "origin.json").read_text())
    assert origin == {"command": "upcycle", "run": str(trained_run), "step": 12, "mask_fraction": 0.0}
    assert not list(upcycled.parent.glob("*.partial"))


@pytest.mark.slow
def test_training_goes_on_from_an_upcycled_run(
    invoke: Invoke, upcycled: Path, sparse_config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(upcycled, run)
    code, out, err = invoke("train", sparse_config, "--out", run)
    assert code == 0, err
    first, *_, last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], last["step"]) == (1, 12)
    trained = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
    assert first["loss"] < 3.5  # of a new model it is log(264) = 5.6
    assert trained[-1]["loss"] < first["loss"]


def test_masks_by_command(invoke: Invoke, trained_run: Path, sparse_config: Path, tmp_path: Path) -> None:
    code, out, _ = invoke(
        "upcycle", trained_run, sparse_config, "--out", tmp_path / "run", "--mask-fraction", "0.5", "--train.seed=3"
    )
    assert code == 0
    assert out == f"{tmp_path / 'run'}: upcycled from step 12 of {trained_run}, a start near it\n"
    cfg = config_io.load_run_config(tmp_path / "run")
    assert cfg.train.seed == 3
    params, step = read_params(tmp_path / "run", cfg)
    assert step == 0
    w = layers_of(params["stack"], cfg.model)[1]["ffn"]["experts"]["w_up"]
    assert 0.4 < np.mean(w == 0) < 0.6


def test_usage_by_command(invoke: Invoke, moe_run: Path, tmp_path: Path) -> None:
    code, out, err = invoke("experts", moe_run, "--batches", 1, "--json", tmp_path / "usage.json")
    assert code == 0, err
    assert re.findall(r"^layer (\d)", out, re.MULTILINE) == ["0", "1", "3", "5"]
    report = json.loads((tmp_path / "usage.json").read_text())
    assert [len(layer["share"]) for layer in report["layers"]] == [4, 6, 6, 6]
    code, texts, err = invoke(*generation(moe_run), "--resident-experts", 2, "--usage", tmp_path / "usage.json")
    assert code == 0
    assert re.fullmatch(r"experts fetched from host memory: [\d,]+ times, [\d.]+ MB\n", err)
    assert invoke(*generation(moe_run)) == (0, texts, "")


def generation(run: Path) -> tuple[object, ...]:
    return "generate", run, "--prompt", "a dog", "--max-new-tokens", 5, "--temperature", 0


def test_a_pruned_run_evaluates_and_generates(invoke: Invoke, upcycled: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    code, said, err = invoke("prune", upcycled, "--keep", 2, "--out", out, "--since", upcycled)
    assert code == 0, err
    assert said == f"{out}: 2 experts per layer, from step 0 of {upcycled}\n"
    cfg = config_io.load_run_config(out)
    assert {block.ffn.num_experts for block in cfg.model.blocks() if isinstance(block.ffn, config.MoE)} == {2}
    # All experts are the same so far: with two of three the function is, too.
    assert invoke(*generation(out)) == invoke(*generation(upcycled))
    reports = [evaluate_run(config_io.load_run_config(run), run, data_spec=None) for run in (upcycled, out)]
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_pruning_compares_with_the_parameters_of_the_seed(invoke: Invoke, moe_run: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(moe_run, run)
    (run / "origin.json").unlink()
    code, _, err = invoke("prune", run, "--keep", 3, "--out", out)
    assert code == 0, err
    cfg = config_io.load_run_config(run)
    init, _ = build(cfg.model, cfg.kernels)
    start = layers_of(drawn(init, jax.random.key(cfg.train.seed), ("router",))["stack"], cfg.model)
    params = layers_of(read_params(run, cfg)[0]["stack"], cfg.model)
    pruned_cfg = config_io.load_run_config(out)
    pruned = layers_of(read_params(out, pruned_cfg)[0]["stack"], pruned_cfg.model)
    for layer in (0, 1, 3, 5):
        w, w0 = (p[layer]["ffn"]["router"]["gate"]["w"] for p in (params, start))
        change = np.abs(np.linalg.norm(w, axis=0) - np.linalg.norm(w0, axis=0))
        kept = np.sort(np.argsort(-change)[:3])
        np.testing.assert_array_equal(pruned[layer]["ffn"]["router"]["gate"]["w"], w[:, kept])
    hybridlm.load(out)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("experts nowhere", ("nowhere: no such run directory",)),
        ("experts {dense}", ("no layer of this run has experts",)),
        ("experts {moe} --batches 0", ("--batches=0: must be at least 1",)),
        ("experts {moe} --json nowhere/usage.json", ("--json nowhere/usage.json: no directory nowhere",)),
        ("generate {dense} --prompt x --resident-experts 2", ("--resident-experts=2: no layer of this run has",)),
        ("generate {moe} --prompt x --resident-experts 0", ("--resident-experts=0: must be at least 1 and at most",)),
        ("generate {moe} --prompt x --resident-experts 5", ("--resident-experts=5: must be", "num_experts=4")),
        ("generate {moe} --prompt x --usage u.json", ("--usage u.json: ", "give --resident-experts as well")),
        ("generate {moe} --prompt x --resident-experts 2 --usage u.json", ("u.json: cannot be read: No such file",)),
        ("upcycle nowhere {sparse} --out {new}", ("nowhere: no such run directory",)),
        ("upcycle {dense} nowhere.py --out {new}", ("nowhere.py: no such file",)),
        ("upcycle {dense} {sparse}", ("upcycle: ", "required: --out")),
        ("upcycle {dense} {sparse} --out {moe}", ("--out {moe}: is there already and holds something",)),
        ("upcycle {dense} {sparse} --out {dense}/config.json", ("--out {dense}/config.json: is a file",)),
        ("upcycle {dense} {sparse} --out {dense}/config.json/run", ("--out ", "cannot be written to")),
        (
            "upcycle {dense} {sparse} --out {new} --mask-fraction 1",
            ("mask_fraction=1.0: must be at least 0",),
        ),
        ("upcycle {dense} {sparse} --out {new} --model.width=32", ("model.width=32: the dense model has 16",)),
        ("upcycle {dense} {dense}/config.json --out {new}", ("model.pattern: is the dense model's",)),
        (
            "upcycle {dense} {sparse} --out {new} --model.pattern.1.ffn.hidden=12",
            ("model.pattern.1.ffn.hidden=12: must divide the dense model's hidden=32",),
        ),
        ("upcycle {moe} {sparse} --out {new}", ("model.num_layers=3: the dense model has 6",)),
        ("prune nowhere --keep 2 --out {new}", ("nowhere: no such run directory",)),
        ("prune {dense} --keep 2 --out {new}", ("model.pattern: no layer has experts",)),
        ("prune {moe} --keep 0 --out {new} --since {moe}", ("model.prologue.0.ffn.num_experts=4: cannot keep 0",)),
        ("prune {moe} --keep 5 --out {new} --since {moe}", ("model.prologue.0.ffn.num_experts=4: cannot keep 5",)),
        ("prune {moe} --keep 1 --out {new} --since {moe}", ("model.pattern.0.ffn.router.k=2: must be at most",)),
        ("prune {moe} --keep 2 --out {new} --since {dense}", ("--since {dense}: is a run of another model",)),
        ("prune {moe} --keep 2 --out {new} --since nowhere", ("nowhere: no such run directory",)),
        ("prune {moe} --keep 2 --out {new}", ("did not begin at random parameters; give --since",)),
        ("prune {moe} --keep 2 --out {dense} --since {moe}", ("--out {dense}: is there already",)),
    ],
)
def test_wrong_words_are_one_line_and_leave_nothing(
    invoke: Invoke,
    trained_run: Path,
    moe_run: Path,
    sparse_config: Path,
    tmp_path: Path,
    words: str,
    parts: tuple[str, ...],
) -> None:
    places = {"dense": trained_run, "moe": moe_run, "sparse": sparse_config, "new": tmp_path / "new"}
    invoke(*words.format(**places).split()).assert_refused(*(part.format(**places) for part in parts))
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(
    invoke: Invoke, trained_run: Path, sparse_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hybridlm.train.derived.Checkpoints.save", fail)
    code, _, err = invoke("upcycle", trained_run, sparse_config, "--out", tmp_path / "run")
    assert (code, err) == (1, "hybridlm: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []
