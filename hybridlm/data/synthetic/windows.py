"""Examples of a task as windows, each a function of its index. Letters: t time."""

import hashlib
from dataclasses import dataclass

import numpy as np

from hybridlm import config
from hybridlm.data.packing import FIELDS, Window, padding_window
from hybridlm.data.synthetic import make_example

HELD_OUT = 2**62
"""The first example that is held out: no run has so many for training."""


@dataclass(frozen=True)
class TaskWindows:
    """Examples `first` to `first + num - 1`, one in each window, of lengths from `lengths`; the rest is padding."""

    task: config.Task
    seq_len: int
    lengths: range
    first: int
    num: int

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Window:
        """Window `index`: the fields of `hybridlm.data.packing.Windows`.

        `loss_weight` is 1 where there is an answer. An answer counts as a byte, so that bits per byte are bits per
        answer.
        """
        if not 0 <= index < self.num:
            raise IndexError(f"window {index} of {self.num}")
        rng = np.random.Generator(np.random.Philox(key=self.task.seed, counter=[0, 0, 0, self.first + int(index)]))
        length = self.lengths[int(rng.integers(len(self.lengths)))]
        example = make_example(self.task, length, rng)
        window, end = self.padding(), len(example.tokens)
        window["tokens"][:end] = example.tokens
        window["targets"][:end] = example.targets
        window["segment_ids"][:end] = 1
        window["positions"][:end] = np.arange(end)
        window["loss_weight"][:end] = window["target_bytes"][:end] = example.answers
        return window

    def padding(self) -> Window:
        """A window of padding only."""
        return padding_window(0, self.seq_len)

    def fingerprint(self) -> str:
        """Of all that the windows depend on; of the first few as well, since NumPy may come to draw others."""
        digest = hashlib.sha256(repr(self).encode())
        for index in range(min(self.num, 8)):
            window = self[index]
            for name in FIELDS:
                digest.update(window[name].tobytes())
        return digest.hexdigest()


def training_windows(task: config.Task, seq_len: int) -> TaskWindows:
    """The examples for training."""
    return TaskWindows(task, seq_len, task.lengths(seq_len), 0, task.num_examples)


def held_out_windows(task: config.Task, seq_len: int) -> TaskWindows:
    """Those that are held out, of the same lengths."""
    return TaskWindows(task, seq_len, task.lengths(seq_len), HELD_OUT, task.num_validation)


def windows_of_length(task: config.Task, length: int) -> TaskWindows:
    """Those that are held out, all of one length, in windows that just hold them."""
    return TaskWindows(task, task.num_tokens(length), range(length, length + 1), HELD_OUT, task.num_validation)
