"""Checkpoints of several processes: another number restores them, and one that cannot read its part holds up nobody."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = 120
TOGETHER = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from hybridlm.config import Attention, Block, Checkpoint, Mesh, Model
from hybridlm.distributed import joined
from hybridlm.sharding import make_mesh
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.fingerprint import diverged_replicas
from hybridlm.train.step import TrainState

command, directory = sys.argv[1], Path(sys.argv[2])
block = Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=None)
model = Model(vocab_size=8, width=8, num_layers=3, pattern=(block,))

def state_of(step):
    def put(shape, *spec):
        x = np.random.default_rng(step).standard_normal(shape, np.float32)
        return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, jax.P(*spec)), lambda index: x[index])
    count = jax.make_array_from_callback((), jax.NamedSharding(mesh, jax.P()), lambda index: np.asarray(step, np.int32))
    axis = "fsdp" if command != "restore-replicated" else None
    params = {"embedding": put((64, 48), axis, None), "norm": put((48,), None)}
    params["stack"] = {"repeats": {0: {"w": put((3, 32, 48), None, None, axis)}}}
    return TrainState(count, params, (jax.tree.map(lambda x: x + 1, params),), count, count, {})

with joined():
    mesh = make_mesh(Mesh(data=-1, fsdp=2) if command == "restore-replicated" else Mesh(data=1, fsdp=-1))
    with jax.set_mesh(mesh), Checkpoints(directory, model, Checkpoint(keep=3, timeout_seconds=20)) as checkpoints:
        if command.startswith("save"):
            for step in (4, 8):
                if step == 8 and command == "save-on-a-full-disk" and jax.process_index() == 1:
                    checkpoints.wait()
                    # Files larger than this fail to be written, as all do on a full disk; pipes do not count.
                    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
                checkpoints.save(step, state_of(step), {"position": step}, {})
            checkpoints.wait()
            print("saved", [saved.step for saved in checkpoints.finished()], flush=True)
        else:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))
            state, data = checkpoints.restore(abstract)
            step = data["position"]
            same = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), state, state_of(step))
            assert all(jax.tree.leaves(same)), same
            print("restored", step, int(state.step), diverged_replicas(state), flush=True)
            if command == "diverge" :
                w = state.params["norm"]
                pieces = []
                for shard in w.addressable_shards:
                    copy = np.array(shard.data)
                    if jax.process_index() == 1 and not pieces:
                        copy.view(np.uint32)[5] ^= 1
                    pieces.append(jax.device_put(copy, shard.device))
                w = jax.make_array_from_single_device_arrays(w.shape, w.sharding, pieces)
                print("diverged", diverged_replicas({"norm": w, "embedding": state.params["embedding"]}), flush=True)
"""

Together = Callable[..., list[str]]


@pytest.fixture
def together(process_environment: dict[str, str], free_port: Callable[[], int]) -> Together:
    """What `count` processes with four devices in all print while they do the same with the checkpoints at a path.

    All have to end with `code`; where it is not 0, their errors are returned.
    """

    def run(count: int, command: str, directory: Path, code: int = 0) -> list[str]:
        group = {
            "HYBRIDLM_COORDINATOR": f"127.0.0.1:{free_port()}",
            "HYBRIDLM_NUM_PROCESSES": str(count),
            "JAX_NUM_CPU_DEVICES": str(4 // count),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER, command, str(directory)],
                env=process_environment | group | {"HYBRIDLM_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        try:
            ended = [(process, *process.communicate(timeout=SECONDS)) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [code] * count, "".join(err for _, _, err in ended)
        return [err if code else out for _, out, err in ended]

    return run


def said(out: str, *words: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(words)]


@pytest.mark.slow
def test_another_number_of_processes_restores_what_two_saved(together: Together, tmp_path: Path) -> None:
    assert [said(out, "saved") for out in together(2, "save", tmp_path)] == [["saved [4, 8]"]] * 2
    assert sorted(path.name for path in (tmp_path / "8").glob("_integrity*")) == [
        "_integrity.0-of-2.json",
        "_integrity.1-of-2.json",
    ]
    for count, command in ((1, "restore"), (2, "restore-replicated"), (4, "restore")):
        outs = together(count, command, tmp_path)
        assert [said(out, "restored") for out in outs] == [["restored 8 8 []"]] * count


@pytest.mark.slow
@pytest.mark.parametrize("checksums", [True, False], ids=["with checksums", "without checksums"])
def test_a_file_that_one_process_cannot_read_holds_up_nobody(
    checksums: bool, together: Together, tmp_path: Path
) -> None:
    together(2, "save", tmp_path)
    stored = max((tmp_path / "8" / "state").glob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(stored, stored.stat().st_size // 2)
    if not checksums:
        for path in (tmp_path / "8").glob("_integrity*"):
            path.unlink()
    outs = together(2, "restore", tmp_path)
    assert [said(out, "restored") for out in outs] == [["restored 4 4 []"]] * 2
    named = said(outs[0], str(tmp_path))
    assert len(named) == 1
    assert f"{tmp_path / '8'} is damaged: " in named[0]
    assert named[0].endswith("; it is set aside as corrupt.8")
    assert said(outs[1], str(tmp_path)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "corrupt.8"]


@pytest.mark.slow
def test_a_copy_that_differs_on_one_host_is_named_on_all(together: Together, tmp_path: Path) -> None:
    together(1, "save", tmp_path)
    outs = together(2, "diverge", tmp_path)
    assert [said(out, "diverged") for out in outs] == [["diverged ['norm']"]] * 2


@pytest.mark.slow
def test_a_full_disk_of_one_host_ends_all(together: Together, tmp_path: Path) -> None:
    errors = together(2, "save-on-a-full-disk", tmp_path, code=1)
    for error in errors:
        assert "the checkpoint of step 8 could not be saved; that of step 4 is whole: " in error
    together(1, "restore", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["4"]
