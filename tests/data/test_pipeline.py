"""Batches: their order, their independence of hosts and devices, exact resume, evaluation, bad corpora."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.data.packing import Windows, tokenize
from hybridlm.data.pipeline import Batches, StepRows, evaluation_batches, load_corpus
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer

Write = Callable[[dict[str, bytes]], Path]
BATCH = 8


def make_windows(num_windows: int = 13, seq_len: int = 5) -> Windows:
    """Windows that all differ; the last one is padded."""
    text = np.random.default_rng(0).integers(0, 256, num_windows * seq_len - 3, np.uint8).tobytes()
    windows = Windows(tokenize([Document("a", text)], ByteTokenizer()), seq_len)
    assert len(windows) == num_windows
    return windows


def draw(batches: Batches, count: int) -> list[dict[str, np.ndarray]]:
    return [{name: np.asarray(array) for name, array in next(batches).items()} for _ in range(count)]


def assert_same(ours: list[dict[str, np.ndarray]], theirs: list[dict[str, np.ndarray]]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def eight_devices(*shape: int) -> NamedSharding:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    names = ("data", "fsdp", "tensor")[: len(shape)]
    mesh = jax.make_mesh(shape, names)
    return NamedSharding(mesh, PartitionSpec(names[:2]))


def test_a_batch_is_a_slice_of_the_endless_shuffled_sequence() -> None:
    windows = make_windows()
    order = grain.MapDataset.source(range(len(windows))).seed(3).shuffle().repeat()
    batches = Batches(windows, batch_size=BATCH, seed=3, sharding=None, prefetch=2)
    for step, batch in enumerate(draw(batches, 5)):
        for row in range(BATCH):
            expected = windows[order[step * BATCH + row]]
            assert all(np.array_equal(batch[name][row], expected[name]) for name in expected)
    batches.close()


def test_each_epoch_draws_every_window_once_in_another_order() -> None:
    windows = make_windows(num_windows=12)
    batches = Batches(windows, batch_size=4, seed=0, sharding=None, prefetch=1)
    rows = np.concatenate([batch["tokens"] for batch in draw(batches, 6)])
    batches.close()
    everything = sorted(windows[i]["tokens"].tolist() for i in range(12))
    assert sorted(rows[:12].tolist()) == sorted(rows[12:].tolist()) == everything
    assert rows[:12].tolist() != rows[12:].tolist()


def test_the_order_is_the_one_that_old_checkpoints_count_on() -> None:
    """A Grain that shuffles differently would resume runs on other data without saying so."""
    order = grain.MapDataset.source(range(7)).seed(3).shuffle().repeat()
    assert [order[i] for i in range(14)] == [4, 6, 0, 2, 5, 3, 1, 2, 1, 3, 4, 6, 0, 5]


@pytest.mark.parametrize("shape", [(8,), (4, 2), (2, 2, 2), (1, 2, 4)], ids=str)
def test_any_mesh_gives_the_single_device_batches(shape: tuple[int, ...]) -> None:
    sharding, windows = eight_devices(*shape), make_windows()
    single = Batches(windows, batch_size=BATCH, seed=1, sharding=None, prefetch=2)
    spread = Batches(windows, batch_size=BATCH, seed=1, sharding=sharding, prefetch=2)
    batch = next(spread)
    assert all(array.sharding == sharding for array in batch.values())
    spread.set_state(spread.state() | {"next_step": 0})
    assert_same(draw(single, 4), draw(spread, 4))
    single.close()
    spread.close()


@pytest.mark.parametrize("num_hosts", [1, 2, 4, 8])
def test_hosts_read_disjoint_rows_of_the_same_batch(num_hosts: int) -> None:
    windows = make_windows()
    whole = StepRows(windows, batch_size=BATCH, seed=5, rows=np.arange(BATCH))
    hosts = [StepRows(windows, batch_size=BATCH, seed=5, rows=rows) for rows in np.split(np.arange(BATCH), num_hosts)]
    for step in (0, 1, 17):
        parts = [host[step] for host in hosts]
        for name, array in whole[step].items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


HOST = """
    import sys
    import jax, numpy as np
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
    from jax.sharding import NamedSharding, PartitionSpec
    from hybridlm.data.packing import Windows, tokenize
    from hybridlm.data.pipeline import Batches
    from hybridlm.data.sources import Document
    from hybridlm.data.tokenizers import ByteTokenizer
    text = np.random.default_rng(0).integers(0, 256, 62, np.uint8).tobytes()
    windows = Windows(tokenize([Document("a", text)], ByteTokenizer()), 5)
    sharding = NamedSharding(jax.make_mesh((4,), ("data",)), PartitionSpec("data"))
    batches = Batches(windows, batch_size=8, seed=1, sharding=sharding, prefetch=2)
    rows = {}
    for step in range(3):
        for shard in next(batches)["targets"].addressable_shards:
            for row, values in zip(range(*shard.index[0].indices(8)), shard.data):
                rows[f"{step},{row}"] = np.asarray(values).tolist()
    import json
    print(json.dumps({"rows": rows, "state": batches.state()}))
    batches.close()
"""


def test_two_processes_give_the_single_process_batches(unused_port: int) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOST), f"127.0.0.1:{unused_port}"]
    hosts = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        outputs = [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    batches = Batches(make_windows(), batch_size=8, seed=1, sharding=None, prefetch=2)
    expected = [batch["targets"] for batch in draw(batches, 3)]
    assert all(output["state"] == batches.state() for output in outputs)
    batches.close()
    assert sorted(len(output["rows"]) for output in outputs) == [12, 12]
    rows = outputs[0]["rows"] | outputs[1]["rows"]
    assert rows == {f"{s},{r}": expected[s][r].tolist() for s in range(3) for r in range(8)}


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_resuming_continues_after_the_last_batch_that_was_handed_out(prefetch: int) -> None:
    windows = make_windows()
    unbroken = Batches(windows, batch_size=BATCH, seed=2, sharding=None, prefetch=4)
    expected = draw(unbroken, 9)
    unbroken.close()

    first = Batches(windows, batch_size=BATCH, seed=2, sharding=None, prefetch=prefetch)
    draw(first, 4)
    state = json.loads(json.dumps(first.state()))
    first.close()
    assert state == {"next_step": 4, "seed": 2, "batch_size": BATCH}

    resumed = Batches(windows, batch_size=BATCH, seed=2, sharding=None, prefetch=2)
    draw(resumed, 1)
    resumed.set_state(state)
    assert_same(draw(resumed, 5), expected[4:])
    resumed.close()

    started = Batches(windows, batch_size=BATCH, seed=2, sharding=None, prefetch=2, start_step=6)
    assert_same(draw(started, 3), expected[6:])
    started.close()


@pytest.mark.parametrize(("name", "value"), [("seed", 3), ("batch_size", 16)])
def test_the_state_of_another_order_is_refused(name: str, value: int) -> None:
    batches = Batches(make_windows(), batch_size=BATCH, seed=2, sharding=None, prefetch=1)
    with pytest.raises(ConfigError, match=rf"train\.{name}=.*made with {value}"):
        batches.set_state(batches.state() | {name: value})
    batches.close()


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


def test_the_standard_library_is_split_by_file_and_described() -> None:
    corpus = load_corpus(config.Data(seq_len=512))
    assert corpus.description.startswith("python-stdlib: ") and "held out" in corpus.description
    assert corpus.train.stream.num_targets > 5_000_000
    held_out = len(corpus.validation_bytes())
    assert held_out == int(corpus.validation.stream.num_bytes.sum())
    assert 0.002 < held_out / corpus.train.stream.num_targets < 0.1
    assert len(corpus.validation_documents) == len(corpus.validation.stream.starts) > 1


def test_the_fingerprint_tells_corpora_apart(
    write_files: Write, bpe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_files({"a.txt": b"some text " * 9, "b.txt": b"other text " * 9})
    monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "cache"))
    data = dict(source="text", path=str(root), seq_len=8)
    original = load_corpus(config.Data(**data)).fingerprint
    assert load_corpus(config.Data(**data)).fingerprint == original
    others = [
        load_corpus(config.Data(**data | {"seq_len": 9})).fingerprint,
        load_corpus(config.Data(**data, tokenizer=str(bpe_file))).fingerprint,
    ]
    (root / "b.txt").write_bytes(b"other text!" * 9)
    others.append(load_corpus(config.Data(**data)).fingerprint)
    assert len({original, *others}) == 4


def test_a_training_text_shorter_than_a_sequence_names_the_longest_that_works(write_files: Write) -> None:
    root = write_files({"a.txt": b"x" * 40})
    with pytest.raises(ConfigError) as caught:
        load_corpus(config.Data(source="text", path=str(root), seq_len=64, validation_fraction=0.1))
    assert str(caught.value) == (
        "data.seq_len=64: the training text has only 37 tokens; seq_len may be at most 37, or add text"
    )
    corpus = load_corpus(config.Data(source="text", path=str(root), seq_len=37, validation_fraction=0.1))
    assert (len(corpus.train), len(corpus.validation), len(corpus.validation_bytes())) == (1, 1, 4)
