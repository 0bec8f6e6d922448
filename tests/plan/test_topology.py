"""Names of devices that are not there."""

import pytest

from hybridlm.config import Mesh
from hybridlm.config_check import ConfigError
from hybridlm.plan.topology import CHIPS, topology


@pytest.mark.parametrize(("name", "devices"), [("v5e", 1), ("v5e:4x4", 16), ("v5p:8x8x16", 1024), ("tpu7x:2x2x1", 8)])
def test_a_name_gives_the_devices_of_its_slice(name: str, devices: int) -> None:
    assert topology(name).num_devices == devices
    mesh = topology(name).mesh(Mesh(data=1, fsdp=-1))
    assert mesh.shape == {"data": 1, "fsdp": devices, "expert": 1, "tensor": 1}
    assert mesh.abstract_device.platform == "tpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x", "--topology=v5x: no such device; known are cpu, v4,"),
        ("h200:", None),
        ("v5e:2x", "--topology=v5e:2x: after the colon come numbers of chips, as in v5e:2x2"),
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


def test_a_mesh_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide the 4 there are"):
        topology("v5e:2x2").mesh(Mesh(data=3, fsdp=-1))


@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_names_agree_with_the_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="needs libtpu, which knows the TPUs: pip install 'hybridlm[tpu]'")
    import jax
    import numpy as np
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slice_name = f"{name}:2x2" if name in ("v5e", "v6e") else f"{name}:2x2x1"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=slice_name).devices
    real = jax.sharding.Mesh(np.array(devices), ("x",)).abstract_mesh.abstract_device
    assert topology(slice_name).num_devices == len(devices)
    assert topology(slice_name).mesh(Mesh(data=-1)).abstract_device == real
