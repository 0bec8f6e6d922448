"""`hybridlm finetune`: what it begins with, what it trains, and how it goes on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io, load
from hybridlm.config_check import ConfigError
from hybridlm.evaluation.perplexity import evaluate_run
from hybridlm.train.derived import read_params
from hybridlm.train.finetuned import finetune_run
from tests.conftest import Invoked

Invoke = Callable[..., Invoked]


@pytest.fixture(scope="session")
def base_loss(trained_run: Path, new_text_config: Path) -> float:
    """Of the run to fine-tune, on held-out text of the new corpus."""
    return evaluate_run(config_io.load_json(new_text_config), trained_run, data_spec=None)["loss"]


@pytest.fixture(scope="session")
def lora_run(trained_run: Path, new_text_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of rank 4."""
    from hybridlm import cli

    directory = tmp_path_factory.mktemp("runs") / "lora"
    words = ["finetune", new_text_config, "--init-from", trained_run, "--out", directory, "--lora", 4]
    assert cli.run([str(word) for word in words]) == 0
    return directory


def last_loss(run: Path) -> float:
    return json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["loss"]


def leaves(tree: Any) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in found}


def test_adapters_learn_the_new_text(lora_run: Path, base_loss: float) -> None:
    assert last_loss(lora_run) < base_loss - 0.3


def test_full_fine_tuning_learns_it_and_stops_where_it_is_asked(
    invoke: Invoke, trained_run: Path, new_text_config: Path, tmp_path: Path, base_loss: float
) -> None:
    words = ("finetune", new_text_config, "--init-from", trained_run, "--out", tmp_path / "run")
    result = invoke(*words)
    assert result.code == 0, result.err
    assert last_loss(tmp_path / "run") < base_loss - 0.5
    assert f"begins with the parameters of step 12 of {trained_run}" in result.out


def test_loaded_parameters_have_their_adapters_added(lora_run: Path, trained_run: Path) -> None:
    """So does evaluation, which reads them the same way: with the loss that training saw."""
    config = config_io.load_run_config(lora_run)
    params, step = read_params(lora_run, config)
    before, _ = read_params(trained_run, config)
    changed = {path for path, x in leaves(params).items() if not np.array_equal(x, leaves(before)[path])}
    assert step == 8
    assert changed == {
        p for p in leaves(before) if p.split(".")[-1] in ("w", "w_q", "w_k", "w_v", "w_o") or "w_gate_" in p
    }
    assert evaluate_run(config, lora_run, data_spec=None)["loss"] == pytest.approx(last_loss(lora_run), rel=1e-2)
    model, _, _ = load(lora_run)
    assert set(leaves(model.params)) == set(leaves(before))


@pytest.mark.slow
def test_resumed_adapters_are_bit_for_bit_those_of_an_uninterrupted_run(
    lora_run: Path, invoke: Invoke, trained_run: Path, new_text_config: Path, tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(lora_run, again)
    shutil.rmtree(again / "checkpoints" / "8")
    result = invoke("finetune", new_text_config, "--init-from", trained_run, "--out", again, "--lora", 4)
    assert result.code == 0, result.err
    assert "resumed from step 4" in result.out
    config = config_io.load_run_config(lora_run)
    one, other = (leaves(read_params(run, config)[0]) for run in (lora_run, again))
    assert all(np.array_equal(one[path], other[path]) for path in one)


def test_more_words_and_new_modules_begin_where_they_are_allowed_to(
    invoke: Invoke, trained_run: Path, new_text_config: Path, tmp_path: Path
) -> None:
    config = config_io.load_json(new_text_config)
    grown = replace(config.model, vocab_size=272, tied_embedding=False)
    path = tmp_path / "grown.json"
    config_io.dump_json(replace(config, model=grown), path)
    words = ("finetune", path, "--init-from", trained_run, "--out", tmp_path / "run", "--train.steps=1")
    words = (*words, "--optimizer.schedule.warmup_steps=0")
    invoke(*words).assert_refused("has no w_head", "--finetune.fresh")
    assert not (tmp_path / "run" / "checkpoints" / "0").exists()
    result = invoke(*words, '--finetune.fresh=["w_head"]')
    assert result.code == 0, result.err
    assert "drawn anew: w_head" in result.out
    assert "new words: 8" in result.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--dora"], ["--dora", "--lora"]),
        (["--lora", "0"], ["--lora", "at least 1"]),
        (["--lora", "2", '--finetune.lora.targets=["*.w_nothing"]'], ["finetune.lora.targets.0", "*.w_nothing"]),
        (['--finetune.frozen=["*"]'], ["finetune", "trains no parameter"]),
        (['--finetune.trained=["embeding"]'], ["finetune.trained.0", "did you mean embedding?"]),
        (["--model.pattern.1.mixer.window=4"], ["model.pattern.1.mixer.window", "8 -> 4", "finetune.differs"]),
        (["--model.vocab_size=260"], ["model.vocab_size", "264"]),
    ],
)
def test_wrong_input_is_told_in_a_line(
    invoke: Invoke, trained_run: Path, new_text_config: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    out = tmp_path / "run"
    invoke("finetune", new_text_config, "--init-from", trained_run, "--out", out, *words).assert_refused(*parts)
    assert not (out / "config.json").exists()


def test_a_published_model_that_cannot_be_imported_leaves_nothing(
    invoke: Invoke, new_text_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Abacus"]}')
    invoke("finetune", "--init-from", tmp_path, "--out", tmp_path / "run").assert_refused("Abacus", "known are Llama")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="hybridlm import .* makes a run of it"):
        finetune_run(config_io.load_json(new_text_config), tmp_path, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_directory_of_another_run_is_left_alone(invoke: Invoke, trained_run: Path, tmp_path: Path) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    result = invoke("finetune", "--init-from", trained_run, "--out", tmp_path / "run")
    result.assert_refused("began at random parameters", "--out")


def test_train_does_not_begin_a_fine_tuning_run_at_random(invoke: Invoke, lora_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lora_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    invoke("train", lora_run / "config.json", "--out", tmp_path / "run").assert_refused("hybridlm finetune")
