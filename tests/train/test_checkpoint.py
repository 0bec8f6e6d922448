"""Checkpoints: committed whole or not at all, whatever happens while they are written."""

import asyncio
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

import hybridlm
from hybridlm.config import Attention, Block, Checkpoint, Config, Model
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.sharding import make_mesh
from hybridlm.train.checkpoint import Checkpoints, abstract_state
from hybridlm.train.step import TrainState
from hybridlm.train.steps import is_complete, set_aside_incomplete


def opened(directory: Path, model: Model | None = None, **fields: Any) -> Checkpoints:
    """The latest two are kept. `small_state` is of no model, so that its layers do not matter."""
    blocks = (Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=None),)
    unused = Model(vocab_size=8, width=8, num_layers=3, pattern=blocks)
    return Checkpoints(directory, model or unused, Checkpoint(**{"keep": 2, **fields}))


def small_state(step: int) -> TrainState:
    count = jnp.asarray(step, jnp.int32)
    params = {"w": jnp.arange(6.0).reshape(2, 3) * step, "blocks": [{"b": jnp.full(5, 0.5)}, {"b": jnp.ones(5)}]}
    return TrainState(count, params, (jax.tree.map(jnp.zeros_like, params), ()), count, count, {})


def abstract(state: Any) -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def test_state_and_data_position_come_back_exactly(tmp_path: Path) -> None:
    data = {"corpus": "abc", "batches": {"next_step": 7, "seed": 2**32 - 1}}
    with opened(tmp_path) as checkpoints:
        for step in (3, 5, 7):
            checkpoints.save(step, small_state(step), data, {"width": 4})
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 7
        state, restored = checkpoints.restore(abstract(small_state(0)))
    assert restored == data
    jax.tree.map(np.testing.assert_array_equal, state, small_state(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "7"]
    config = next(tmp_path.glob("7/config/*.json"))
    assert json.loads(config.read_text()) == {"width": 4, "format": 3}


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, small_state(3), {}, {})
        checkpoints.save(3, small_state(4), {}, {})
        checkpoints.wait()
        state, _ = checkpoints.restore(abstract(small_state(0)))
    assert int(state.step) == 3


@pytest.mark.parametrize("missing", ["everything", "_CHECKPOINT_METADATA", "state/_METADATA", "data"])
def test_an_incomplete_directory_is_set_aside(tmp_path: Path, missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, small_state(3), {}, {})
    if missing == "everything":
        (tmp_path / "9").mkdir()
    else:
        shutil.copytree(tmp_path / "3", tmp_path / "9")
        path = tmp_path / "9" / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
    assert (tmp_path / "9").is_dir()  # whoever only reads leaves it: a run may be writing here
    set_aside_incomplete(tmp_path)
    assert (tmp_path / "incomplete.9").is_dir()
    assert "set aside as incomplete.9" in capsys.readouterr().out


def test_of_incomplete_directories_those_of_the_last_crash_stay(tmp_path: Path) -> None:
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (tmp_path / "incomplete.2").symlink_to(kept)
    for crash in ((5, 9), (9, 12)):
        for step in crash:
            (tmp_path / str(step)).mkdir()
            (tmp_path / str(step) / f"of the crash at {crash[-1]}").touch()
        set_aside_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "incomplete.12", "incomplete.9"]
    assert (tmp_path / "incomplete.9" / "of the crash at 12").exists()


def test_a_directory_with_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with (
        opened(tmp_path) as checkpoints,
        pytest.raises(ConfigError, match="holds no complete checkpoint; train first"),
    ):
        checkpoints.restore_params({})


def test_parameters_are_read_without_the_optimizer(trained_run: Path, tiny_config: Config) -> None:
    init, _ = build(tiny_config.model, tiny_config.kernels)
    wanted = abstract(jax.eval_shape(lambda: init(jax.random.key(0))))
    with opened(trained_run / "checkpoints", tiny_config.model) as checkpoints:
        params = checkpoints.restore_params(wanted)
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    assert params["embedding"].shape == (264, 16)
    assert params["embedding"].devices() == {jax.devices()[0]}


def test_another_format_is_refused_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr("hybridlm.train.checkpoint.FORMAT", 1)
        with opened(tmp_path) as checkpoints:
            checkpoints.save(3, small_state(3), {}, {})
    with opened(tmp_path) as checkpoints:
        with pytest.raises(ConfigError, match="3: was written in format 1, and this version goes on from format 3"):
            checkpoints.restore(small_state(3))
        params = checkpoints.restore_params(small_state(3).params)
    np.testing.assert_array_equal(params["w"], small_state(3).params["w"])


def test_parameters_of_other_shapes_are_refused_clearly(trained_run: Path, tiny_config: Config) -> None:
    model = replace(tiny_config.model, width=32)
    init, _ = build(model, tiny_config.kernels)
    mesh = make_mesh(tiny_config.sharding.mesh)
    with jax.set_mesh(mesh), opened(trained_run / "checkpoints", model) as checkpoints:
        with pytest.raises(ConfigError) as refusal:
            checkpoints.restore_params(abstract_state(lambda: init(jax.random.key(0)), mesh))
    assert "embedding" in str(refusal.value)
    assert "(264, 16)" in str(refusal.value)
    assert "(264, 32)" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_writes_given_up_after_a_failed_one_print_no_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr("hybridlm.train.checkpoint._report_unraisable", reported.append)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # to be put back
    opened(tmp_path)
    promise, write = tensorstore.Promise.new()

    async def finish() -> None:
        await write

    async def give_up() -> None:
        await asyncio.wait([asyncio.ensure_future(finish())], timeout=0.01)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(give_up())
    loop.close()
    promise.set_result(None)  # which calls back at once
    assert not reported
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError("another")))
    assert [str(one.exc_value) for one in reported] == ["another"]


FULL_DISK = """
import resource
from hybridlm.cli import main
from hybridlm.train.checkpoint import Checkpoints
save = Checkpoints.save
def save_on_a_full_disk(self, step, *parts):
    if step == 8:
        self.wait()  # the save of step 4 goes on in the background
        # Files larger than this fail to be written, as all do on a full disk; pipes do not count.
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))
    save(self, step, *parts)
Checkpoints.save = save_on_a_full_disk
main()
"""


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint_whole(
    trained_run: Path, tmp_path: Path, process_environment: dict[str, str]
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", FULL_DISK, "train", str(trained_run / "config.json"), "--out", str(run)]
    process = subprocess.run(command, env=process_environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1, process.stderr
    assert "the checkpoint of step 8 could not be saved; that of step 4 is whole: " in process.stderr
    assert "Traceback" not in process.stderr
    assert is_complete(run / "checkpoints" / "4")
    assert not is_complete(run / "checkpoints" / "8")
    with opened(run / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 4
    model, _, _ = hybridlm.load(run)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(model.params))
