"""Names of devices that are not there."""

import importlib.util

import pytest

from hybridlm.config import Mesh
from hybridlm.config_check import ConfigError
from hybridlm.plan.topology import CHIPS, shapes, topology
from tests.absent import absent_tpus


@pytest.mark.parametrize(("name", "devices"), [("v5e", 1), ("v5e:4x4", 16), ("v5p:8x8x16", 1024), ("tpu7x:2x2x1", 8)])
def test_a_name_gives_the_devices_of_its_slice(name: str, devices: int) -> None:
    assert topology(name).num_devices == devices
    mesh = topology(name).abstract_mesh(Mesh(data=1, fsdp=-1))
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == ({"fsdp": devices} if devices > 1 else {})
    assert mesh.abstract_device.platform == "tpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m3", "--topology=m3: no such device; known are cpu, v4,"),
        ("v5x", "--topology=v5x: no such device; did you mean v5"),
        ("v5e:3x3", "--topology=v5e:3x3: no slice has that shape; try v5e:2x4 or v5e:4x4"),
        ("v5e:16x32", "try v5e:16x16"),
        ("v5p:8x8x4", "try v5p:4x8x8"),
        ("h200:16*2", "no node has that shape; try h200:8*2"),
        ("v5e:4x4*0", "or v5e:4x4*2 for two"),
        ("cpu:2x2", "a CPU has no shape; cpu:4 has as many devices"),
        ("h200:", None),
        ("v5e:2x", "--topology=v5e:2x: after the colon come numbers of chips, as in v5e:4x4"),
        ("v5e:0", "after the colon"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name: str, message: str | None) -> None:
    if message is None:
        assert topology(name).num_devices == 1
        return
    with pytest.raises(ConfigError) as refusal:
        topology(name)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_several_slices_are_the_outer_axis_of_the_mesh() -> None:
    found = topology("v5e:16x16*16")
    assert (found.num_devices, found.num_slices, found.name) == (4096, 16, "v5e:16x16*16")
    assert dict(found.abstract_mesh(Mesh(data=1, fsdp=-1)).shape) | {} == {
        "slices": 16, "data": 1, "fsdp": 256, "expert": 1, "context": 1, "tensor": 1
    }  # fmt: skip


def test_every_shape_has_a_larger_one_or_more_slices() -> None:
    assert [topology(name).larger() for name in ("v5e", "v5e:4x4", "v5e:16x16", "h200:8", "cpu:8")] == [
        topology("v5e:2x2"), topology("v5e:4x8"), topology("v5e:16x16*2"), topology("h200:8*2"), None
    ]  # fmt: skip
    for kind in ("v5p", "v6e"):
        assert all(topology(f"{kind}:{'x'.join(map(str, shape))}").shape == shape for shape in shapes(kind))


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide the 4 there are"):
        topology("v5e:2x2").abstract_mesh(Mesh(data=3, fsdp=-1))


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_names_agree_with_the_compiler(name: str) -> None:
    import jax
    import numpy as np

    slice_name = f"{name}:2x2" if name in ("v5e", "v6e") else f"{name}:2x2x1"
    devices = absent_tpus(slice_name)
    real = jax.sharding.Mesh(np.array(devices), ("x",)).abstract_mesh.abstract_device
    assert topology(slice_name).num_devices == len(devices)
    assert topology(slice_name).abstract_mesh(Mesh(data=-1)).abstract_device == real


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v4:4x4x8", (True, True, True)),
        ("v5p:2x2x4", (False, False, False)),
        ("v5p:2x2x1", (False, False, False)),
        ("v5e:16x16*2", (True, True, False)),
        ("v6e:8x16", (False, True, False)),
        ("v5e:8x8", (False, False, False)),
        ("v5e", (False, False, False)),
    ],
)
def test_whole_cubes_and_whole_pods_close_into_rings(name: str, rings: tuple[bool, ...]) -> None:
    assert topology(name).wraps() == rings


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x2", "tpu"), ("h200:8", "cuda")])
def test_a_compiler_that_is_not_installed_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"--topology={name}: needs .*: pip install 'hybridlm\[{extra}\]'"):
        topology(name).devices()
