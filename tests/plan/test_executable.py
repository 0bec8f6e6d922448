"""A step that was planned and saved is the one that a run would compile."""

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest
from hybridlm_kernels.jax_compat import PayloadError, deserialize_executable

from hybridlm.config import Config, Mesh, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.plan.compile import CompiledStep, compile_step
from hybridlm.plan.topology import topology
from hybridlm.train.executable import load_executable, save_executable
from hybridlm.train.loop import train


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    mesh = Mesh(data=2, fsdp=4)
    model = replace(tiny_config.model, num_layers=1)
    train = replace(tiny_config.train, steps=4)
    return replace(tiny_config, model=model, sharding=Sharding(mesh=mesh), train=train)


@pytest.fixture(scope="module")
def compiled(config: Config) -> CompiledStep:
    return compile_step(config, topology("cpu:8"))


@pytest.fixture(scope="module")
def saved(compiled: CompiledStep, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("executables") / "step.bin"
    assert compiled.dump.compiled is not None
    size = save_executable(path, compiled.dump.compiled, compiled.lowered, compiled.mesh, compiled.config)
    assert size == path.stat().st_size and [*path.parent.iterdir()] == [path]
    return path


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_the_executable_has_the_same_losses(
    config: Config, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(config, tmp_path / "compiled") == 0
    monkeypatch.setattr("hybridlm.train.loop.compile_step", None)  # the other run compiles no step
    assert train(config, tmp_path / "loaded", executable=saved) == 0
    assert losses(tmp_path / "loaded") == losses(tmp_path / "compiled") and len(losses(tmp_path / "loaded")) == 4


def refusal(path: Path, compiled: CompiledStep) -> str:
    with pytest.raises(ConfigError) as refused:
        load_executable(path, compiled.lowered, compiled.mesh)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_an_executable_of_another_step_is_refused_before_anything_is_written(
    config: Config, saved: Path, tmp_path: Path
) -> None:
    other = replace(config, optimizer=replace(config.optimizer, weight_decay=0.2))
    with pytest.raises(ConfigError, match="is of another program: the config or the code has changed since"):
        train(other, tmp_path / "run", executable=saved)
    assert not (tmp_path / "run" / "config.json").exists()
    on_another_mesh = replace(config, sharding=Sharding(mesh=Mesh(data=8)))
    with pytest.raises(ConfigError, match="was compiled with data 2, here is 8, was compiled with fsdp 4, here is 1"):
        train(on_another_mesh, tmp_path / "other", executable=saved)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("device_kind", "TPU v5", "was compiled for device_kind TPU v5, here is cpu"),
        ("num_devices", 16, "was compiled for num_devices 16, here is 8"),
        ("versions", {"jax": "0.1", "jaxlib": "0.1"}, "was compiled with jax 0.1, here is "),
        ("format", 0, "was compiled for format 0, here is 1"),
    ],
)
def test_what_differs_is_named(
    saved: Path, compiled: CompiledStep, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    header, _, payload = saved.read_bytes().partition(b"\n")
    path = tmp_path / "step.bin"
    path.write_bytes(json.dumps(json.loads(header) | {field: value}).encode() + b"\n" + payload)
    assert message in refusal(path, compiled)


def test_damaged_and_foreign_files_are_refused(saved: Path, compiled: CompiledStep, tmp_path: Path) -> None:
    path = tmp_path / "step.bin"
    assert "cannot be read: No such file" in refusal(path, compiled)
    path.write_bytes(b"\x80\x04 no json\n")
    assert "holds no executable; `hybridlm plan" in refusal(path, compiled)
    path.write_bytes(b"[1]\n")
    assert "holds no executable" in refusal(path, compiled)
    path.write_bytes(saved.read_bytes()[:-100])
    assert "is damaged: " in refusal(path, compiled)


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("harmful", [Harmful(), (Harmful(), [], False), jax.jit])
def test_a_payload_can_call_nothing(
    saved: Path, compiled: CompiledStep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harmful: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(harmful)
    header = json.loads(saved.read_bytes().partition(b"\n")[0]) | {
        "payload_sha256": hashlib.sha256(payload).hexdigest()
    }
    path = tmp_path / "step.bin"
    path.write_bytes(json.dumps(header).encode() + b"\n" + payload)
    assert "which no executable is made of" in refusal(path, compiled)
    assert not (tmp_path / "harmed").exists()


def test_a_payload_that_is_no_pickle_of_an_executable_is_refused(compiled: CompiledStep) -> None:
    devices = list(compiled.mesh.devices.flat)
    for payload in (b"", b"no pickle", pickle.dumps(3), pickle.dumps((1, 2, 3))):
        with pytest.raises(PayloadError):
            deserialize_executable(payload, compiled.lowered, devices)
