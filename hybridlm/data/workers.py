"""Batches prepared ahead, by a thread of this process or by processes of their own, in the same order."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import wait

import grain
import numpy as np
from absl import flags
from jaxtyping import Shaped

from hybridlm.data.order import BatchRows


class Reader:
    """An iterator over `rows` in order that has `prefetch` batches ready."""

    def __init__(self, rows: BatchRows, *, prefetch: int, workers: int):
        dataset = grain.MapDataset.source(rows)
        self._shared = workers > 0
        if workers == 0:
            # One thread: windows are cheap to cut, and more threads only fight over the interpreter lock.
            ahead = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch))
        else:
            if not flags.FLAGS.is_parsed():
                # Grain reads flags that only absl's own main would have parsed.
                flags.FLAGS.mark_as_parsed()
            # Worker w prepares batches w, w + workers, ...: the order is the same for any number of them.
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=-(-prefetch // workers))
            one_by_one = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            ahead = one_by_one.mp_prefetch(options, worker_init_fn=begin_worker)
        self._iterator = iter(ahead)

    def __iter__(self) -> "Reader":
        return self

    def __next__(self) -> dict[str, Shaped[np.ndarray, "r t"]]:
        batch = next(self._iterator)
        # Out of shared memory, which is given back when the last view of it goes: JAX may keep one for long.
        return {name: np.array(array) for name, array in batch.items()} if self._shared else batch

    def close(self) -> None:
        """Stop reading, and end the processes."""
        self._iterator.close()


def begin_worker(_index: int, _count: int) -> None:
    """Leave signals to the training process, whose last steps need batches, but end with it, however it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
