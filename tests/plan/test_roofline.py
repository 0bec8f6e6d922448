"""Times of collectives and steps against numbers worked out by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybridlm.plan.chips import GB, HARDWARE, Hardware
from hybridlm.plan.collectives import KINDS, Collective
from hybridlm.plan.costs import Cost
from hybridlm.plan.roofline import Estimate, estimate, route
from hybridlm.plan.topology import CHIPS

TORUS = Hardware(
    hbm_bytes=2**30,
    hbm_bandwidth=100.0,
    peak_flops=1000.0,
    link_bandwidth=10.0,
    network_bandwidth=2.0,
    torus_dims=3,
    ring_length=4,
    core_bandwidth=40.0,
)
FLAT = Hardware(None, 100.0, 1000.0, 10.0, 2.0, torus_dims=2, ring_length=16)
SWITCHED = Hardware(None, 100.0, 1000.0, 10.0, 2.0)


def torus(shape: tuple[int, ...], axes: tuple[str, ...], *, slices: int = 1, cores: int = 1) -> Any:
    """A mesh whose devices are numbered along the last dimension of a torus of `shape` first, chip by chip."""
    devices = [
        SimpleNamespace(slice_index=part, coords=[*place, *[0] * (3 - len(shape))], core_on_chip=core)
        for part in range(slices)
        for place in np.ndindex(shape)
        for core in range(cores)
    ]
    return mesh(devices, (*[slices] * (slices > 1), *shape, *[cores] * (cores > 1)), axes)


def gpus(shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    return mesh([SimpleNamespace(id=n) for n in range(int(np.prod(shape)))], shape, axes)


def mesh(devices: list[Any], shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    array = np.empty(len(devices), object)
    array[:] = devices
    return SimpleNamespace(devices=array.reshape(shape), axis_names=axes, size=len(devices))


def collective(kind: str, nbytes: int, *axes: str, runs: int = 1) -> Collective:
    return Collective(kind, axes, "bf16", nbytes, runs, asynchronous=False, scope="", source="")


def estimated(
    found: list[Collective], hardware: Hardware, where: Any, costs: dict[str, Cost] | None = None
) -> Estimate:
    result = estimate(costs or {"other": Cost(2000.0, 0.0)}, found, hardware, 1000.0, where)
    assert result is not None
    return result


@pytest.mark.parametrize(
    ("kind", "seconds"),
    [
        ("all-gather", 80 * 3 / 4 / 20),
        ("reduce-scatter", 80 * 3 / 4 / 20),
        ("all-reduce", 2 * 80 * 3 / 4 / 20),
        ("all-to-all", 80 * 4 / 4 / 20),
        ("ragged-all-to-all", 80 * 4 / 4 / 20),
        ("collective-permute", 80 / 10),
    ],
)
def test_a_ring_of_four_chips_works_in_both_directions(kind: str, seconds: float) -> None:
    found = route(torus((4, 4, 8), ("x", "y", "z")), ("x",), TORUS)
    assert found.seconds(kind, 80) == pytest.approx(seconds)


def test_an_all_to_all_takes_what_its_longest_way_around_the_ring_takes() -> None:
    """Each of 8 chips sends an eighth of its 80 bytes to each other, the shorter way; the slowest link counts."""
    n, nbytes, link = 8, 80, 10.0
    right = [0.0] * n
    for sender in range(n):
        for distance in range(1, n):
            share = {True: 1.0, False: 0.0}[distance < n / 2] if distance != n / 2 else 0.5
            for hop in range(distance):
                right[(sender + hop) % n] += share * nbytes / n
    found = route(torus((4, 4, 8), ("x", "y", "z")), ("z",), TORUS)
    assert found.seconds("all-to-all", nbytes) == pytest.approx(max(right) / link)


def test_a_line_has_half_the_bandwidth_of_a_ring() -> None:
    for shape, hardware in (((2, 4, 4), TORUS), ((4, 4, 6), TORUS), ((8, 8), FLAT)):
        found = route(torus(shape, ("x", "y", "z")[: len(shape)]), ("y",), hardware)
        (line,) = found.lines
        assert (line.is_ring, line.bandwidth) == (False, 10.0)
    (line,) = route(torus((8, 16), ("x", "y")), ("y",), FLAT).lines
    assert (line.is_ring, line.bandwidth) == (True, 20.0)


def test_a_gather_along_two_dimensions_uses_the_links_of_both() -> None:
    found = route(torus((4, 4, 4), ("x", "y", "z")), ("x", "y"), TORUS)
    assert found.seconds("all-gather", 160) == pytest.approx(160 * 15 / 16 / 40)
    assert found.seconds("all-to-all", 160) == pytest.approx(160 * 4 / 4 / 20)  # each dimension has its own hops


def test_groups_that_lie_across_each_other_share_links() -> None:
    """Eight chips in a line as (4, 2): every second chip is in a group, and two groups use each link."""
    line = torus((8,), ("all",))
    where = mesh(list(line.devices.flat), (4, 2), ("far", "near"))
    far, near = (route(where, (axis,), FLAT).lines[0] for axis in ("far", "near"))
    assert (far.chips, far.bandwidth) == (4, 5.0)
    assert (near.chips, near.bandwidth) == (2, 10.0)


def test_devices_of_one_chip_exchange_on_it_and_share_what_comes_from_others() -> None:
    where = torus((4, 4, 4), ("x", "y", "z", "core"), cores=2)
    assert route(where, ("core",), TORUS).seconds("all-gather", 80) == pytest.approx(80 / 2 / 40)
    assert route(where, ("core",), TORUS).seconds("collective-permute", 80) == pytest.approx(80 / 40)
    assert route(where, ("x", "core"), TORUS).seconds("all-gather", 80) == pytest.approx(40 * 3 / 4 / 20)


def test_slices_communicate_by_the_network() -> None:
    found = route(torus((4, 4, 4), ("slices", "x", "y", "z"), slices=3), ("slices",), TORUS)
    assert found.seconds("all-reduce", 60) == pytest.approx(2 * 60 * 2 / 3 / 2)
    assert found.seconds("all-to-all", 60) == pytest.approx(60 * 2 / 3 / 2)
    assert found.seconds("collective-permute", 60) == pytest.approx(60 / 2)


def test_gpus_of_a_node_are_on_a_switch_and_nodes_on_the_network() -> None:
    where = gpus((2, 4, 2), ("node", "fsdp", "tensor"))
    inside = route(where, ("fsdp",), SWITCHED)
    assert inside.seconds("all-gather", 80) == pytest.approx(80 * 3 / 4 / 10)
    assert inside.seconds("all-to-all", 80) == pytest.approx(80 * 3 / 4 / 10)
    assert inside.seconds("collective-permute", 80) == pytest.approx(80 / 10)
    across = route(where, ("node", "fsdp"), SWITCHED)  # four GPUs of each node bring in a quarter of the other's half
    assert across.seconds("all-gather", 80) == pytest.approx(max(40 / (4 * 2), 80 * 3 / 4 / 10))
    assert across.seconds("all-to-all", 80) == pytest.approx(40 / 2)


def test_nodes_of_four_gpus_are_known_by_their_coordinates() -> None:
    devices = [SimpleNamespace(id=n, coords=[n // 4, 0, n % 4]) for n in range(8)]
    found = route(mesh(devices, (2, 4), ("data", "fsdp")), ("data", "fsdp"), SWITCHED)
    assert (found.slices, found.switched) == (2, 4)


def test_a_part_of_the_model_is_bound_by_arithmetic_or_by_memory() -> None:
    costs = {"mixer/RGLRU": Cost(flops=500.0, hbm_bytes=200.0), "ffn/GeGLU": Cost(flops=4000.0, hbm_bytes=100.0)}
    result = estimated([], TORUS, torus((4, 4, 4), ("x", "y", "z")), costs)
    assert result.compute_s == pytest.approx(2.0 + 4.0)
    assert result.hbm_s == pytest.approx(3.0)
    assert result.step_s_overlapped == result.step_s_serial == result.compute_s
    assert result.mfu_overlapped == pytest.approx(1000 / 1000 / 6)


def test_a_step_takes_the_longest_of_its_resources_or_all_of_them_in_turn() -> None:
    where = torus((4, 4, 4), ("slices", "x", "y", "z"), slices=2)
    found = [
        collective("all-gather", 80, "x", runs=2),  # 3 s each
        collective("all-reduce", 80, "y"),  # 6 s
        collective("all-reduce", 4, "slices", runs=5),  # 2 s each
        collective("all-gather", 320, "x", "y"),  # 7.5 s
    ]
    result = estimated(found, TORUS, where)  # and 2 s of arithmetic
    assert result.collective_s == pytest.approx({"slices": 10.0, "x+y": 7.5, "x": 6.0, "y": 6.0})
    assert list(result.collective_s)[:2] == ["slices", "x+y"]
    assert result.step_s_overlapped == pytest.approx(19.5)
    assert result.step_s_serial == pytest.approx(2 + 10 + 19.5)
    assert result.mfu_overlapped == pytest.approx(1 / 19.5)
    assert result.mfu_serial == pytest.approx(1 / 31.5)
    assert any("x+y: 4 chips in a ring" in text for text in result.assumptions)


def test_devices_without_rates_have_no_estimate() -> None:
    assert estimate({}, [], HARDWARE["cpu"], 1.0, gpus((1,), ("data",))) is None


def test_every_device_that_can_be_named_is_known() -> None:
    assert set(HARDWARE) == set(CHIPS)
    for name, hardware in HARDWARE.items():
        if name != "cpu":
            assert hardware.hbm_bytes and hardware.hbm_bandwidth and hardware.peak_flops and hardware.network_bandwidth
            shares = CHIPS[name].devices_per_chip > 1
            assert (hardware.core_bandwidth is not None) == shares


def test_every_kind_of_collective_has_a_time() -> None:
    found = route(torus((4, 4, 4), ("x", "y", "z")), ("x",), TORUS)
    assert all(found.seconds(kind, 80) > 0 for kind in KINDS)


def test_a_known_all_reduce_takes_its_known_time() -> None:
    """1 GB over a whole v5p dimension of 16: 2 x 15/16 GB at 200 GB/s both ways."""
    found = route(torus((16, 4, 4), ("x", "y", "z")), ("x",), HARDWARE["v5p"])
    assert found.seconds("all-reduce", GB) == pytest.approx(2 * 15 / 16 / 200)
