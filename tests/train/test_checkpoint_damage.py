"""Damaged checkpoints are named, and never restored."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybridlm.config import Attention, Block, Checkpoint, Model
from hybridlm.config_check import ConfigError
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.integrity import damaged_arrays, damaged_files, files_of, read_sidecars, stored_pieces
from hybridlm.train.record import read_parts
from hybridlm.train.step import TrainState

BLOCK = Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=None)
MODEL = Model(vocab_size=8, width=8, num_layers=3, pattern=(BLOCK,))
DATA_FILE = "ocdbt.process_0/d/"


def opened(run: Path, **fields: Any) -> Checkpoints:
    return Checkpoints(run / "checkpoints", MODEL, Checkpoint(**{"keep": 4, **fields}))


def state_of(step: int, scale: float = 1.0) -> TrainState:
    count = jnp.asarray(step, jnp.int32)
    draw = np.random.default_rng(step).standard_normal
    params = {
        "embedding": jnp.asarray(scale * draw((40, 33)), jnp.float32),
        "norm": {"scale": jnp.asarray(draw(33), jnp.bfloat16)},
        "stack": {"repeats": {0: {"w": jnp.asarray(draw((3, 21, 33)), jnp.float32)}}},
    }
    return TrainState(count, params, (jax.tree.map(jnp.square, params),), count, count, {})


def abstract() -> Any:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_of(0))


def restored_step(run: Path) -> int:
    """Of the checkpoint that is restored. Asserts that all of it is what was saved."""
    with opened(run) as checkpoints:
        state, data = checkpoints.restore(abstract())
    step = int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
    assert data == {"position": step}
    return step


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("damage") / "run"
    with opened(run) as checkpoints:
        for step in (4, 8):
            checkpoints.save(step, state_of(step), {"position": step}, {"train": {"batch_size": 2}})
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    """A run with whole checkpoints of steps 4 and 8, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "run"))


def latest(run: Path) -> Path:
    return run / "checkpoints" / "8"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def data_file(step_dir: Path) -> Path:
    return max((path for path in step_dir.rglob("d/*") if DATA_FILE in str(path)), key=lambda path: path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def remove_checksums(step_dir: Path) -> None:
    for path in step_dir.glob("_integrity.*"):
        path.unlink()


def test_every_flipped_bit_of_a_file_is_named(run: Path, rng: np.random.Generator) -> None:
    files, problems = read_sidecars(latest(run))
    assert problems == []
    assert set(files) == set(files_of(latest(run)))
    assert list(damaged_files(latest(run), files)) == []
    full = [name for name in files if files[name]["size"]]
    for _ in range(20):
        name = full[rng.integers(len(full))]
        path, bit = latest(run) / name, int(rng.integers(8 * files[name]["size"]))
        flip(path, bit)
        assert list(damaged_files(latest(run), files)) == [f"{name} has another checksum"]
        flip(path, bit)


def test_without_checksums_every_flipped_bit_of_an_array_is_named(run: Path, rng: np.random.Generator) -> None:
    """A bit in which no array is stored may change: it is not restored either."""
    parts, problem = read_parts(latest(run))
    assert problem is None
    arrays, state_dir = parts["fingerprints"]["arrays"], latest(run) / "state"
    stored = data_file(latest(run))
    caught = 0
    for _ in range(20):
        bit = int(rng.integers(8 * stored.stat().st_size))
        flip(stored, bit)
        found = list(damaged_arrays(state_dir, arrays, sorted(arrays)))
        caught += bool(found)
        if not found:
            pieces = [piece for _, piece in stored_pieces(state_dir, "params.embedding")]
            np.testing.assert_array_equal(np.concatenate(pieces), state_of(8).params["embedding"])
        assert all(problem.split()[0] in arrays for problem in found)
        flip(stored, bit)
    assert caught >= 18
    assert list(damaged_arrays(state_dir, arrays, sorted(arrays))) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda path: flip(path, 4 * path.stat().st_size),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("checksums", ["with checksums", "without checksums"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_is_restored(damage: str, checksums: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = data_file(latest(run))
    DAMAGES[damage](stored)
    if checksums == "without checksums":
        remove_checksums(latest(run))
    assert restored_step(run) == 4
    assert names(run) == ["4", "corrupt.8"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{latest(run)} is damaged: ")
    assert line.endswith("; it is set aside as corrupt.8")
    what = f"{stored.relative_to(latest(run))} " if checksums == "with checksums" else "w "
    assert what in line or "params." in line or "opt_state." in line


@pytest.mark.parametrize("part", ["data", "config", "fingerprints"])
def test_changed_json_is_not_believed_even_without_checksums(part: str, run: Path) -> None:
    (file,) = (latest(run) / part).glob("*.json")
    file.write_text(file.read_text().replace("8", "7", 1) if part != "config" else file.read_text().replace("2", "3"))
    remove_checksums(latest(run))
    assert restored_step(run) == 4


def test_where_all_are_damaged_nothing_is_renamed_and_nothing_begins_anew(run: Path) -> None:
    for step in (4, 8):
        data_file(run / "checkpoints" / str(step)).unlink()
    with pytest.raises(ConfigError, match=r"holds no whole checkpoint \(8: state.* cannot be read.*; 4: state") as told:
        restored_step(run)
    assert "\n" not in str(told.value)
    assert names(run) == ["4", "8"]


def test_damaged_checksums_do_not_condemn_a_checkpoint(run: Path, invoke: Any) -> None:
    (sidecar,) = latest(run).glob("_integrity.*")
    flip(sidecar, 8 * 100)
    assert restored_step(run) == 8
    checked = invoke("checkpoints", run, "--verify")
    assert checked.code == 1
    assert checked.out.splitlines()[-1] == f"8: {sidecar.name} is damaged"


def test_checksums_do_not_lead_outside(run: Path) -> None:
    (sidecar,) = latest(run).glob("_integrity.*")
    from hybridlm.train.integrity import digest_of

    files = {"../4/commit_success.txt": {"size": 1, "blake2b": ""}}
    sidecar.write_text(json.dumps({"files": files, "digest": digest_of(files)}))
    assert read_sidecars(latest(run)) == ({}, [f"{sidecar.name} is damaged"])


def test_a_link_in_place_of_a_file_is_not_followed(run: Path) -> None:
    stored = data_file(latest(run))
    stored.rename(run / "elsewhere")
    stored.symlink_to(run / "elsewhere")
    assert restored_step(run) == 4


def test_names_of_damaged_ones_are_never_taken_twice(run: Path) -> None:
    (run / "checkpoints" / "corrupt.8").mkdir()
    (run / "checkpoints" / "corrupt.8.2").symlink_to("nowhere")
    data_file(latest(run)).unlink()
    assert restored_step(run) == 4
    assert names(run) == ["4", "corrupt.8", "corrupt.8.2", "corrupt.8.3"]


def test_a_step_that_was_set_aside_can_be_saved_again(run: Path) -> None:
    data_file(latest(run)).unlink()
    with opened(run) as checkpoints:
        checkpoints.restore(abstract())
        assert checkpoints.latest_step() == 4
        assert [step for step, _ in checkpoints.set_aside] == [8]
        checkpoints.save(8, state_of(8), {"position": 8}, {})
    assert restored_step(run) == 8


def test_another_model_is_no_damage(run: Path) -> None:
    wanted = abstract()
    wanted.params["embedding"] = jax.ShapeDtypeStruct(
        (40, 34), jnp.float32, sharding=wanted.params["embedding"].sharding
    )
    with opened(run) as checkpoints, pytest.raises(ConfigError, match=r"has float32\[40, 33\] as params.embedding"):
        checkpoints.restore(wanted)
    assert names(run) == ["4", "8"]


def test_damaged_parameters_are_not_evaluated(run: Path) -> None:
    remove_checksums(latest(run))
    data_file(latest(run)).unlink()
    with opened(run) as checkpoints, pytest.raises(ConfigError, match="8: is damaged"):
        checkpoints.restore_params(abstract().params)
    assert names(run) == ["4", "8"]


def test_parameters_on_the_host_are_verified_too(run: Path) -> None:
    wanted = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), state_of(0).params)
    with opened(run) as checkpoints:
        params = checkpoints.restore_params(wanted)
    jax.tree.map(np.testing.assert_array_equal, params, state_of(8).params)
    assert isinstance(params["embedding"], np.ndarray)


def test_the_latest_and_every_so_many_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path, keep=2, keep_every=10) as checkpoints:
        for step in range(4, 24, 3):
            checkpoints.save(step, state_of(step), {"position": step}, {})
    assert names(tmp_path) == ["10", "19", "22"]


def test_what_a_save_cost_is_told_once(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {}, {})
        checkpoints.wait()
        finished = checkpoints.finished()
        assert checkpoints.finished() == []
    assert [saved.step for saved in finished] == [1, 2]
    for saved in finished:
        assert 0 < saved.stall_seconds <= saved.seconds
        assert saved.num_bytes == sum(x.nbytes for x in jax.tree.leaves(state_of(0)))


def test_the_command_lists_and_verifies(run: Path, invoke: Any, tmp_path: Path) -> None:
    listed = invoke("checkpoints", run)
    assert listed.code == 0
    header, *lines = listed.out.splitlines()
    assert header.split() == ["step", "written", "GB", "tokens", "format", "state"]
    assert [line.split()[0] for line in lines] == ["4", "8"]
    assert all(line.endswith("3  has checksums") for line in lines)
    assert [line.split()[-1] for line in invoke("checkpoints", run, "--verify").out.splitlines()[1:]] == ["whole"] * 2
    stored = data_file(latest(run))
    flip(stored, 4 * stored.stat().st_size)
    damaged = invoke("checkpoints", run, "--verify", "--json", tmp_path / "checked.json")
    assert damaged.code == 1
    named = damaged.out.splitlines()[3:]
    assert f"8: {stored.relative_to(latest(run))} has another checksum" in named
    assert any(line.startswith(("8: params.", "8: opt_state.")) for line in named)
    records = json.loads((tmp_path / "checked.json").read_text())["checkpoints"]
    assert [(record["name"], record["state"]) for record in records] == [("4", "whole"), ("8", "damaged")]


def test_the_command_names_values_that_are_not_finite(tmp_path: Path, invoke: Any) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state_of(3, scale=np.inf), {}, {})
    checked = invoke("checkpoints", tmp_path, "--verify")
    assert checked.code == 1
    assert checked.out.splitlines()[2:] == [
        f"3: {name} has values that are not finite" for name in ("opt_state.0.embedding", "params.embedding")
    ]


def test_the_command_refuses_what_is_no_run(tmp_path: Path, invoke: Any) -> None:
    invoke("checkpoints", tmp_path).assert_refused("holds no checkpoints", str(tmp_path))
