"""Batches: their independence of hosts, devices and workers, exact resume, what they tell of progress, evaluation."""

import json
import subprocess
import sys
import textwrap
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm.config_check import ConfigError
from hybridlm.data.order import Mixture, Order, Source, only
from hybridlm.data.packing import JoinedWindows, Windows, tokenize
from hybridlm.data.pipeline import Batches, evaluation_batches
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer
from tests.data.rows import assert_same, draw

BATCH = 8
STAGES = ((0, (3, 1)), (4, (1, 2)), (9, (0, 1)))


def make_windows(num_windows: int = 13, seq_len: int = 5, seed: int = 0) -> Windows:
    """Windows that all differ; the last one is padded."""
    text = np.random.default_rng(seed).integers(0, 256, num_windows * seq_len - 3, np.uint8).tobytes()
    windows = Windows(tokenize([Document("a", text)], ByteTokenizer()), seq_len)
    assert len(windows) == num_windows
    return windows


def make_mixture(stages: tuple[tuple[int, tuple[int, ...]], ...] = STAGES) -> Mixture:
    sources = (Source("web", make_windows(13), "abc"), Source("code", make_windows(6, seed=1), "def"))
    return Mixture(sources, stages)


def make_batches(mixture: Mixture | None = None, **changes: Any) -> Batches:
    arguments = dict(batch_size=BATCH, seed=2, sharding=None, prefetch=2) | changes
    return Batches(make_mixture() if mixture is None else mixture, **arguments)


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


def eight_devices(*shape: int) -> NamedSharding:
    names = ("data", "fsdp", "tensor")[: len(shape)]
    mesh = jax.make_mesh(shape, names)
    return NamedSharding(mesh, PartitionSpec(names[:2]))


def test_a_batch_is_a_slice_of_the_endless_sequence() -> None:
    mixture = make_mixture()
    order = Order(mixture.sources, mixture.proportions(BATCH), 2)
    for number, batch in enumerate(draw(make_batches(mixture), 12)):
        for row in range(BATCH):
            expected = order.window(number * BATCH + row)
            assert all(np.array_equal(batch[name][row], expected[name]) for name in expected)


def test_each_epoch_draws_every_window_once_in_another_order() -> None:
    windows = make_windows(num_windows=12)
    rows = np.concatenate([batch["tokens"] for batch in draw(make_batches(only(windows), batch_size=4), 6)])
    everything = sorted(windows[i]["tokens"].tolist() for i in range(12))
    assert sorted(rows[:12].tolist()) == sorted(rows[12:].tolist()) == everything
    assert rows[:12].tolist() != rows[12:].tolist()


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 2, 2), (1, 2, 4)], ids=str)
def test_any_mesh_gives_the_single_device_batches(shape: tuple[int, ...]) -> None:
    sharding = eight_devices(*shape)
    spread = make_batches(sharding=sharding)
    assert all(array.sharding == sharding for array in next(spread).values())
    spread.set_state(make_batches().state())
    assert_same(draw(spread, 11), draw(make_batches(), 11))


HOST = """
    import sys
    import jax, numpy as np
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4 // int(sys.argv[3]))
    jax.distributed.initialize(sys.argv[1], num_processes=int(sys.argv[3]), process_id=int(sys.argv[2]))
    from jax.sharding import NamedSharding, PartitionSpec
    from hybridlm.data.order import Mixture, Source
    from hybridlm.data.packing import Windows, tokenize
    from hybridlm.data.pipeline import Batches
    from hybridlm.data.sources import Document
    from hybridlm.data.tokenizers import ByteTokenizer
    def windows(number, seed):
        text = np.random.default_rng(seed).integers(0, 256, number * 5 - 3, np.uint8).tobytes()
        return Windows(tokenize([Document("a", text)], ByteTokenizer()), 5)
    sources = (Source("web", windows(13, 0), "abc"), Source("code", windows(6, 1), "def"))
    mixture = Mixture(sources, ((0, (3, 1)), (4, (1, 2)), (9, (0, 1))))
    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    batches = Batches(mixture, batch_size=8, seed=2, sharding=sharding, prefetch=2)
    rows = {}
    for step in range(11):
        for shard in next(batches)["targets"].addressable_shards:
            for row, values in zip(range(*shard.index[0].indices(8)), shard.data):
                rows[f"{step},{row}"] = np.asarray(values).tolist()
    import json
    print(json.dumps({"rows": rows, "state": batches.state(), "progress": batches.progress()}))
    batches.close()
"""


@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_give_the_single_process_batches(num_processes: int, unused_port: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOST), f"127.0.0.1:{unused_port}"]
    hosts = [
        subprocess.Popen([*command, str(i), str(num_processes)], stdout=subprocess.PIPE, text=True)
        for i in range(num_processes)
    ]
    try:
        outputs = [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    batches = make_batches()
    expected = [batch["targets"] for batch in draw(batches, 11)]
    assert all(output["state"] == through_json(batches.state()) for output in outputs)
    assert all(output["progress"] == batches.progress() for output in outputs)
    assert [len(output["rows"]) for output in outputs] == [88 // num_processes] * num_processes
    rows = {name: row for output in outputs for name, row in output["rows"].items()}
    assert rows == {f"{s},{r}": expected[s][r].tolist() for s in range(11) for r in range(8)}


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("drawn", [0, 3, 4, 10])
def test_resuming_continues_after_the_last_batch_that_was_handed_out(drawn: int, prefetch: int) -> None:
    expected = draw(make_batches(), 15)
    first = make_batches(prefetch=prefetch)
    draw(first, drawn)
    state = through_json(first.state())
    assert first.position == state["position"] == drawn - 1

    resumed = make_batches()
    draw(resumed, 1)
    resumed.set_state(state)
    assert resumed.state() == first.state()
    assert resumed.progress() == first.progress()
    assert_same(draw(resumed, 15 - drawn), expected[drawn:])


def test_skipped_batches_are_never_handed_out_again() -> None:
    expected = draw(make_batches(), 16)
    batches = make_batches()
    draw(batches, 7)
    saved = through_json(batches.state())
    draw(batches, 4)
    # As after a roll-back: 8 and 9 were bad.
    batches.set_state(saved)
    batches.skip(8, 9)
    drawn = [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(2)]
    # While the batch after next is prepared already.
    batches.skip(11, 11)
    assert_same(drawn + draw(batches, 1), [expected[i] for i in (7, 10, 12)])
    state = through_json(batches.state())
    assert (batches.position, state["skipped"]) == (12, [[8, 9], [11, 11]])

    resumed = make_batches()
    resumed.set_state(state)
    assert_same(draw(resumed, 3), expected[13:])
    assert resumed.position == 15


def test_ranges_that_touch_are_one() -> None:
    batches = make_batches()
    for first, last in [(9, 9), (3, 4), (5, 5), (4, 7), (12, 14)]:
        batches.skip(first, last)
    assert batches.state()["skipped"] == [[3, 7], [9, 9], [12, 14]]


def test_what_was_handed_out_cannot_be_skipped() -> None:
    batches = make_batches()
    draw(batches, 3)
    with pytest.raises(ValueError, match="cannot skip batches 2 to 4 after batch 2 was handed out"):
        batches.skip(2, 4)


@pytest.mark.parametrize(("name", "value"), [("seed", 3), ("batch_size", 16)])
def test_the_state_of_another_order_is_refused(name: str, value: int) -> None:
    batches = make_batches()
    with pytest.raises(ConfigError, match=rf"train\.{name}=.*made with {value}"):
        batches.set_state(batches.state() | {name: value})


def test_a_state_of_an_older_version_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data: .* another version of hybridlm"):
        make_batches().set_state({"next_step": 4, "seed": 2, "batch_size": BATCH})


def test_other_sources_are_refused_by_name() -> None:
    state = make_batches().state()
    with pytest.raises(ConfigError, match=r"^data: the checkpoint's run read web, code, and this one data"):
        make_batches(only(make_windows())).set_state(state)
    grown = Mixture((*make_mixture().sources[:1], Source("code", make_windows(7, seed=1), "deg")), STAGES)
    with pytest.raises(ConfigError, match=r"^data: code is other text than the checkpoint's run read"):
        make_batches(grown).set_state(state)


def test_weights_may_change_after_the_position_and_not_before() -> None:
    first = make_batches()
    draw(first, 6)
    state = through_json(first.state())
    later = make_batches(make_mixture((*STAGES[:2], (7, (1, 1)))))
    later.set_state(state)
    expected = draw(make_batches(make_mixture((*STAGES[:2], (7, (1, 1))))), 12)
    assert_same(draw(later, 6), expected[6:])
    for stages in (STAGES[:1], ((0, (1, 1)), *STAGES[1:]), (*STAGES[:2], (5, (1, 1)))):
        with pytest.raises(
            ConfigError, match=r"^data\.stages: the checkpoint's 6 batches were drawn with other weights"
        ):
            make_batches(make_mixture(stages)).set_state(state)


def test_progress_is_that_of_a_count_by_batch() -> None:
    batches, mixture = make_batches(), make_mixture()
    batches.skip(3, 5)
    order = Order(mixture.sources, mixture.proportions(BATCH), 2)
    drawn, passed, epochs, before = np.zeros((4, 2), int)
    assert batches.progress() == {"tokens/web": 0, "tokens/code": 0, "epoch/web": 0.0, "epoch/code": 0.0}
    told: dict[str, int] = {}
    for number in range(14):
        places = [order.place(number * BATCH + row) for row in range(BATCH)]
        for place in places:
            passed[place.source] += 1
            drawn[place.source] += not 3 <= number <= 5
            epochs[place.source] = place.epoch + 1
        if 3 <= number <= 5:
            continue
        next(batches)
        assert batches.position == number
        assert batches.progress() == {
            "tokens/web": drawn[0] * 5,
            "tokens/code": drawn[1] * 5,
            "epoch/web": passed[0] / 13,
            "epoch/code": passed[1] / 6,
        }
        begun = {name: int(epochs[k]) for k, name in enumerate(("web", "code")) if epochs[k] > max(before[k], 1)}
        assert batches.repeated() == begun
        told |= begun
        before = epochs.copy()
    batches.close()
    assert told == {"web": -(-passed[0] // 13), "code": -(-passed[1] // 6)} == {"web": 3, "code": 13}
    assert batches.epochs(14) == {"web": passed[0] / 13, "code": passed[1] / 6}


@pytest.mark.parametrize("spread", [False, True])
def test_evaluation_sees_every_window_in_order_and_pads_the_last_batch(spread: bool) -> None:
    windows = make_windows(num_windows=13)
    sharding = eight_devices(8) if spread else None
    batches = list(evaluation_batches(windows, batch_size=BATCH, sharding=sharding, limit=None))
    assert len(batches) == 2
    for name in windows[0]:
        rows = np.concatenate([np.asarray(batch[name]) for batch in batches])
        assert np.array_equal(rows[:13], np.stack([windows[i][name] for i in range(13)]))
        assert np.array_equal(rows[13:], np.stack([windows.padding()[name]] * 3))
    assert sum(float(batch["loss_weight"].sum()) for batch in batches) == windows.stream.num_targets


def test_evaluation_stops_at_the_limit() -> None:
    windows = make_windows(num_windows=13)
    assert [len(list(evaluation_batches(windows, batch_size=4, sharding=None, limit=n))) for n in (1, 3, 9)] == [
        1,
        3,
        4,
    ]


def test_evaluation_goes_through_one_source_after_the_other() -> None:
    first, second = make_windows(3), make_windows(4, seed=1)
    joined = JoinedWindows([first, second])
    batches = list(evaluation_batches(joined, batch_size=4, sharding=None, limit=None))
    rows = np.concatenate([np.asarray(batch["targets"]) for batch in batches])
    expected = [windows[i]["targets"] for windows in (first, second) for i in range(len(windows))]
    assert np.array_equal(rows, np.stack([*expected, joined.padding()["targets"]]))
    for index in (-1, 7):
        with pytest.raises(IndexError):
            joined[index]
