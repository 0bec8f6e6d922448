"""What the other tests here rely on finds what was lost, repeated or changed."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.faults.history import History, assert_same, entered, records


def write(path: Path, *lines: tuple[int, int, str]) -> Path:
    """Lines of the witness of one process: the batch before, the batch, what its row held."""
    told = [{"process": 0, "after": after, "batch": batch, "rows": {"0": row}} for after, batch, row in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in told))
    return path


def test_batches_handed_out_behind_a_checkpoint_are_forgotten_when_a_process_goes_on(tmp_path: Path) -> None:
    handed = write(tmp_path / "handed", (-1, 0, "a"), (0, 1, "b"), (1, 2, "lost"), (0, 1, "b"), (1, 2, "c"))
    assert entered(handed) == {0: {"0": "a"}, 1: {"0": "b"}, 2: {"0": "c"}}


def test_a_batch_that_no_process_was_handed_is_missed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="batch 2 was never handed out"):
        entered(write(tmp_path / "handed", (-1, 0, "a"), (0, 1, "b"), (2, 3, "d")))


def test_a_step_that_is_there_twice_is_found(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n')
    with pytest.raises(AssertionError, match="a step is there twice"):
        records(path)


def test_one_bit_of_a_loss_or_an_array_is_a_difference() -> None:
    def history(loss: float, weight: float) -> History:
        return History({1: {"loss": loss}}, {}, {"w": np.array([1.0, weight], np.float32)}, {"position": 0})

    assert_same(history(2.0, 0.5), history(2.0, 0.5))
    with pytest.raises(AssertionError, match="loss of step 1"):
        assert_same(history(np.nextafter(2.0, 3.0), 0.5), history(2.0, 0.5))
    with pytest.raises(AssertionError, match="w"):
        assert_same(history(2.0, 0.5), history(2.0, float(np.nextafter(np.float32(0.5), np.float32(1)))))
    assert_same(history(2.0, 0.5 + 1e-7), history(2.0, 0.5), rtol=1e-6)
