"""Models and runs linearised: which layers change, that weights stay, and that training recovers what was lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.config import (
    RGLRU,
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Distill,
    Eval,
    Finetune,
    GeGLU,
    Kernels,
    Liger,
    LoRA,
    Model,
)
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.model.by_layer import layers_of
from hybridlm.model.linearize import linearize, linearized_model
from hybridlm.train.derived import read_params

Invoke = Callable[..., Any]
GLOBAL = Attention(num_heads=4, num_kv_heads=2, rope_fraction=0.5, rope_theta=500.0, logit_soft_cap=9.0, qk_norm=True)
FFN = GeGLU(hidden=24)
RECURRENT, WIDE, LOCAL = (
    Block(mixer=mixer, ffn=FFN) for mixer in (RGLRU(width=16, num_heads=2), GLOBAL, replace(GLOBAL, window=8))
)
MODEL = Model(vocab_size=40, width=16, num_layers=9, prologue=(WIDE,), pattern=(RECURRENT, WIDE), epilogue=(LOCAL,))
LINEAR = Liger(
    num_heads=4, num_kv_heads=2, window=8, rope_fraction=0.5, rope_theta=500.0, logit_soft_cap=9.0, qk_norm=True
)


def test_attention_beyond_the_window_becomes_liger_with_its_fields() -> None:
    model = linearized_model(MODEL, recurrence="gla", window=8)
    linear = replace(WIDE, mixer=LINEAR)
    assert (model.prologue, model.pattern, model.epilogue) == ((linear,), (RECURRENT, linear), (LOCAL,))
    model = linearized_model(MODEL, recurrence="simple_gla", window=7)
    assert model.epilogue[0].mixer == replace(LINEAR, window=7, recurrence="simple_gla")


def test_every_kth_layer_stays() -> None:
    """Layers 0, 2, 4 and 6 have attention over everything; the second and the fourth of them stay."""
    model = linearized_model(MODEL, recurrence="gla", window=8, keep_every=2)
    stays = [i for i, block in enumerate(model.blocks()) if block == WIDE]
    assert stays == [2, 6]
    assert model.num_layers == 9 and len(model.pattern) == 4
    assert [block.mixer == LINEAR for block in model.blocks()] == [i in (0, 4) for i in range(9)]


def test_weights_stay_with_their_layers() -> None:
    shapes = jax.eval_shape(lambda: build(MODEL, Kernels())[0](jax.random.key(0)))
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda x: draw(x.shape, np.float32), shapes)
    model = linearized_model(MODEL, recurrence="gla", window=8, keep_every=2)
    made = linearize(params, MODEL, model)
    wanted = jax.eval_shape(lambda: build(model, Kernels())[0](jax.random.key(0)))
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, wanted)
    for before, after in zip(layers_of(params["stack"], MODEL), layers_of(made["stack"], model), strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    others = ({name: part for name, part in tree.items() if name != "stack"} for tree in (params, made))
    jax.tree.map(np.testing.assert_array_equal, *others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "--window=0: must be at least 1"),
        ({"window": 8, "keep_every": 1}, "--keep-every=1: must be at least 2"),
    ],
)
def test_options_out_of_range_are_errors(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linearized_model(MODEL, recurrence="gla", **options)
    with pytest.raises(ConfigError, match="model.pattern: no layer has attention over more than 8 tokens"):
        linearized_model(replace(MODEL, num_layers=1, prologue=()), recurrence="gla", window=8)


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    block = Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=FFN)
    return replace(
        tiny_config,
        model=Model(vocab_size=264, width=16, num_layers=2, pattern=(block,)),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=3)),
        train=replace(tiny_config.train, steps=40),
        eval=Eval(every=100, batches=2),
        checkpoint=Checkpoint(every=100),
    )


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hybridlm.train.loop import train

    directory = tmp_path_factory.mktemp("runs") / "softmax"
    assert train(config, directory) == 0
    return directory


def held_out(run: Path) -> float:
    return json.loads((run / "eval.jsonl").read_text().splitlines()[-1])["loss"]


@pytest.mark.slow
def test_a_linearised_run_learns_faster_than_one_that_begins_anew(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    out, anew = tmp_path / "linear", tmp_path / "anew"
    code, said, err = invoke("linearize", run, "--out", out, "--window", 4, "--train.steps=5")
    assert (code, said) == (0, f"{out}: 2 of 2 layers linearised, from step 40 of {run}\n"), err
    made = config_io.load_run_config(out)
    assert {type(block.mixer) for block in made.model.blocks()} == {Liger}
    before, after = (read_params(directory, config_io.load_run_config(directory)) for directory in (run, out))
    assert (before[1], after[1]) == (40, 0)
    jax.tree.map(np.testing.assert_array_equal, before[0], after[0])
    assert json.loads((out / "origin.json").read_text()) == {"command": "linearize", "run": str(run), "step": 40}
    for directory in (out, anew):
        assert invoke("train", out / "config.json", "--out", directory).code == 0
    assert held_out(out) < held_out(run) + 0.1 < held_out(anew) - 1


def test_the_run_may_be_the_teacher_of_the_new_one(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    options = ("--distill", "--keep-every", 2, "--mixer", "simple_gla")
    code, said, err = invoke("linearize", run, "--out", tmp_path / "new", "--window", 4, *options)
    assert code == 0, err
    assert said.startswith(f"{tmp_path / 'new'}: 1 of 2 layers linearised")
    made = config_io.load_run_config(tmp_path / "new")
    assert made.distill == Distill(teacher=str(run), teacher_step=40)
    assert [type(block.mixer) for block in made.model.blocks()] == [Liger, Attention]


@pytest.mark.slow
def test_adapters_recover_what_linearisation_lost(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    out, targets = tmp_path / "liger", '--finetune.lora.targets=["*.mixer.w_[qkv]"]'
    result = invoke("linearize", run, "--out", out, "--window", 4, "--distill", "--lora", 2, targets)
    assert result.code == 0, result.err
    before, _ = read_params(out, config_io.load_run_config(out))
    assert invoke("train", out / "config.json", "--out", out).code == 0
    divergences = [json.loads(line)["divergence"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(divergences[-5:]) < 0.8 * np.mean(divergences[:5])
    after, _ = read_params(out, config_io.load_run_config(out))
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    changed = {str(path[-1].key) for (path, x), y in pairs if not np.array_equal(x, y)}
    assert changed == {"w_q", "w_k", "w_v"}


def test_a_linearised_run_trains_the_adapters_that_are_asked_for(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    result = invoke("linearize", run, "--out", out, "--window", 4, "--lora", 2, "--dora")
    assert result.code == 0, result.err
    assert config_io.load_run_config(out).finetune == Finetune(lora=LoRA(rank=2, dora=True))
    before, after = (read_params(directory, config_io.load_run_config(directory))[0] for directory in (run, out))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), before, after)  # DoRA's norms are rounded


def test_wrong_input_is_one_line_and_leaves_nothing(invoke: Invoke, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    for options, part in [
        ((run, "--model.num_layers=3"), "model: is the run's; --mixer, --window and --keep-every say"),
        ((run, "--window", "64", "--model.pattern.0.mixer.window=8"), "model: is the run's"),
        (("nowhere",), "nowhere: no such run directory"),
        ((run, "--mixer", "mamba"), "invalid choice: 'mamba'"),
    ]:
        invoke("linearize", *options, "--out", out).assert_refused(part)
        assert not out.exists()
