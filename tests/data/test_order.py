"""The order of samples against a loop that draws them one by one, and what each epoch of each source holds."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from hybridlm.data.mixture import interleave
from hybridlm.data.order import BatchRows, Mixture, Order, Source, nth_kept, only
from hybridlm.data.packing import Windows, tokenize
from hybridlm.data.sources import Document
from hybridlm.data.tokenizers import ByteTokenizer

SIZES = (5, 1, 12)
STAGES = ((0, (3, 1, 2)), (4, (0, 1, 1)), (9, (5, 0, 4)))
BATCH = 7


def windows_of(num_windows: int, seed: int, seq_len: int = 6) -> Windows:
    """Windows that all differ; the last one is padded."""
    text = np.random.default_rng(seed).integers(0, 256, num_windows * seq_len - 3, np.uint8).tobytes()
    return Windows(tokenize([Document("a", text)], ByteTokenizer()), seq_len)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    sources = tuple(Source(f"source {k}", windows_of(n, k), str(k)) for k, n in enumerate(SIZES))
    return Mixture(sources, STAGES)


def order_of(mixture: Mixture, seed: int = 3) -> Order:
    return Order(mixture.sources, mixture.proportions(BATCH), seed)


def test_every_window_of_every_source_is_drawn_once_per_epoch(mixture: Mixture) -> None:
    order = order_of(mixture)
    places = [order.place(sample) for sample in range(40 * BATCH)]
    drawn = Counter(places)
    assert set(drawn.values()) == {1}
    for k, size in enumerate(SIZES):
        epochs = [place.epoch for place in places if place.source == k]
        assert epochs == sorted(epochs)
        for epoch in range(max(epochs)):
            assert {p.window for p in places if p.source == k and p.epoch == epoch} == set(range(size))


def test_sources_take_turns_in_the_proportions_of_each_stage(mixture: Mixture) -> None:
    order = order_of(mixture)
    for (first, places), (end, _) in zip(STAGES, [*STAGES[1:], (30, ())], strict=True):
        drawn = [order.place(sample).source for sample in range(first * BATCH, end * BATCH)]
        turns = interleave(places).tolist()
        assert drawn == [turns[i % len(turns)] for i in range(len(drawn))]


def test_epochs_and_sources_and_seeds_have_orders_of_their_own() -> None:
    sources = tuple(Source(name, windows_of(12, 0), "") for name in "ab")
    orders = set()
    for seed in (1, 2):
        order = Order(sources, Mixture(sources, ((0, (1, 1)),)).proportions(4), seed)
        places = [order.place(sample) for sample in range(72)]
        for k in range(2):
            for epoch in range(3):
                orders.add(tuple(p.window for p in places if (p.source, p.epoch) == (k, epoch)))
    assert len(orders) == 12


def test_the_order_is_the_one_that_checkpoints_count_on() -> None:
    """A change of it would resume runs on other data; it needs another number in `ORDER`, which refuses them."""
    mixture = only(windows_of(7, 0))
    order = Order(mixture.sources, mixture.proportions(1), seed=3)
    assert [order.place(sample).window for sample in range(14)] == [0, 5, 1, 6, 2, 4, 3, 0, 5, 1, 2, 4, 6, 3]


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_read_disjoint_rows_of_the_same_batch(mixture: Mixture, num_hosts: int) -> None:
    order, size = order_of(mixture), 8
    whole = BatchRows(order, batch_size=size, rows=np.arange(size))
    hosts = [BatchRows(order, batch_size=size, rows=rows) for rows in np.split(np.arange(size), num_hosts)]
    for batch in (0, 1, 17):
        parts = [host[batch] for host in hosts]
        for name, array in whole[batch].items():
            assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_skipped_batches_are_left_out_and_nothing_else() -> None:
    skipped = [(2, 2), (5, 8), (30, 31)]
    for position in range(-1, 40):
        kept = [b for b in range(position + 1, 60) if not any(first <= b <= last for first, last in skipped)]
        assert [nth_kept(position, n, skipped) for n in range(15)] == kept[:15]


def test_rows_after_a_position_are_those_of_the_batches_that_are_kept(mixture: Mixture) -> None:
    order, rows = order_of(mixture), np.arange(BATCH)
    unbroken = BatchRows(order, batch_size=BATCH, rows=rows)
    broken = BatchRows(order, batch_size=BATCH, rows=rows, position=3, skipped=[(5, 6)])
    for index, batch in enumerate((4, 7, 8)):
        assert all(np.array_equal(a, unbroken[batch][name]) for name, a in broken[index].items())


def test_a_window_is_found_without_jax() -> None:
    """What worker processes import must not start a device, which one process alone can hold."""
    program = (
        "import hybridlm.data.workers, sys; from jax._src import xla_bridge; "
        "print(xla_bridge.backends_are_initialized(), 'hybridlm.data.pipeline' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
