"""Several processes import a published model together, and fine-tune one."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm import config_io
from hybridlm.interop import import_run
from hybridlm.train.derived import read_params
from tests.interop.published import publish_hugging_face

pytest.importorskip("torch")
pytest.importorskip("transformers")

# `hybridlm import`, which also prints how many tensors the process held at most, and the parameters on its devices.
IMPORT = """
import sys, weakref
import jax
from hybridlm import cli
from hybridlm.interop import runs
from hybridlm.interop.safetensors import Tensors

alive, counts = set(), []
read, read_params = Tensors.read, runs.read_params

def counted(self, name):
    tensor = read(self, name)
    alive.add(name)
    weakref.finalize(tensor, alive.discard, name)
    counts.append(len(alive))
    return tensor

def measured(*arguments):
    params = read_params(*arguments)
    arrays = [x for x in jax.tree.leaves(params) if x.size > 1000]
    held = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards)
    print("measured", max(counts), held, sum(x.nbytes for x in arrays), flush=True)
    return params

Tensors.read, runs.read_params = counted, measured
cli.main(["import", *sys.argv[1:]])
"""


def params_of(run: Path) -> list[np.ndarray]:
    return jax.tree.leaves(read_params(run, config_io.load_run_config(run))[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "tensor=4"])
def test_several_processes_import_what_one_imports(mesh: str, corpus: Path, start: Any, tmp_path: Path) -> None:
    published = tmp_path / "published"
    publish_hugging_face("Llama", published, {"vocab_size": 264, "num_key_value_heads": 4}, max_shard_size="20KB")
    fields = ["data.tokenizer=byte", "data.source=text", f"data.path={corpus}", "data.seq_len=32", "train.batch_size=8"]
    import_run(published, tmp_path / "alone", fields)
    wanted = params_of(tmp_path / "alone")

    options = [f"--{field}" for field in (*fields, "data.validation_fraction=0.2", f"sharding.mesh.{mesh}")]
    options.append("--sharding.mesh.data=1")
    words = (published, "--out", tmp_path / "run", *options)
    ended = start(2, 2, *words, program=("-c", IMPORT)).ended()
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    for process in ended:
        (measured,) = re.findall(r"^measured (\d+) (\d+) (\d+)$", process.out, re.MULTILINE)
        most, held, whole = map(int, measured)
        assert most == 1
        assert held == whole // 2
    assert [f"{tmp_path}/run: 2 layers" in process.out for process in ended] == [True, False]
    for found, one in zip(params_of(tmp_path / "run"), wanted, strict=True):
        np.testing.assert_array_equal(found, one, strict=True)

    steps = ("--train.steps=1", "--train.log-every=1", "--optimizer.schedule.warmup-steps=0", "--eval.batches=1")
    tuned = ("--init-from", published, "--out", tmp_path / "tuned", *options, *steps)
    ended = start(2, 2, *tuned, program=("-m", "hybridlm.cli", "finetune")).ended()
    assert [process.code for process in ended] == [0, 0], ended[0].err + ended[1].err
    assert "done: 1 steps" in ended[0].out
    for found, one in zip(params_of(tmp_path / "tuned.pretrained"), wanted, strict=True):
        np.testing.assert_array_equal(found, one, strict=True)
    assert not list(tmp_path.glob("*.partial"))
