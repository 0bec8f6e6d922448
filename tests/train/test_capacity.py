"""A state that is larger than its devices is refused before anything is allocated, with the numbers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hybridlm.train.capacity import bytes_per_device, memory_of


def test_bytes_of_a_device_are_those_of_its_parts() -> None:
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    sharding = partial(jax.NamedSharding, mesh)
    spec = jax.sharding.PartitionSpec
    state = {
        "cut": jax.ShapeDtypeStruct((8, 6), np.float32, sharding=sharding(spec("rows", "columns"))),
        "whole": jax.ShapeDtypeStruct((3,), np.int16, sharding=sharding(spec())),
        "not sharded": jax.ShapeDtypeStruct((5,), np.int32),
    }
    assert bytes_per_device(state) == 2 * 3 * 4 + 3 * 2 + 5 * 4


def test_the_memory_of_a_cpu_is_shared_by_its_devices() -> None:
    told = Path("/proc/meminfo")
    if not told.exists():
        pytest.skip("this system tells its memory elsewhere")
    (total,) = (line.split()[1] for line in told.read_text().splitlines() if line.startswith("MemTotal"))
    share = memory_of(jax.devices()[0])
    assert share is not None
    assert math.isclose(share * jax.local_device_count(), int(total) * 1024, rel_tol=0.01)


def test_tables_that_do_not_fit_are_refused_with_the_numbers(invoke: Any, corpus: Path, tmp_path: Path) -> None:
    """32,768^2 rows of 128 float32 numbers, and Adam's two moments of each, are 1,536 GiB; half of it over two."""
    words = ["train", "griffin_memory_tiny", "--model.pattern.1.ffn.num_rows=1073741824"]
    words += ["--data.source=text", f"--data.path={corpus}", "--sharding.mesh.data=4", "--sharding.mesh.fsdp=2"]
    invoke(*words, "--out", tmp_path / "run").assert_refused(
        "hybridlm: model: parameters and optimizer state need 768.",
        "GiB on each of 8 devices, of which memories' tables and their optimizer have 768.00",
        "lower num_rows",
    )
    assert not (tmp_path / "run" / "config.json").exists()
