"""What a run has learnt and from which tokens, read from what it left behind, without the code that wrote it."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore

LEARNT = ("loss", "grad_norm", "lr", "bits_per_byte", "batch_tokens", "tokens", "nonfinite_total")
"""What is compared of the records of steps; the others are times."""


class History(NamedTuple):
    """All that two runs have in common which learnt the same from the same text."""

    steps: dict[int, dict[str, float]]
    evaluations: dict[int, dict[str, float]]
    arrays: dict[str, np.ndarray]
    """Of the last checkpoint."""
    data: dict[str, Any]
    """The data position of the last checkpoint."""


def history(run: Path) -> History:
    """Of a run that is done. Each step and each evaluation is there once, in order, and the last one is saved."""
    steps, evaluations = (records(run / name) for name in ("metrics.jsonl", "eval.jsonl"))
    total = max(steps)
    assert list(steps) == list(range(1, total + 1))
    assert list(evaluations) == sorted(evaluations)
    checkpoint = run / "checkpoints" / str(total)
    [data] = (checkpoint / "data").glob("*.json")
    [config] = (checkpoint / "config").glob("*.json")
    train = json.loads(config.read_text())["train"]
    assert total == train["steps"] and train["log_every"] == 1
    return History(
        steps={step: {name: record[name] for name in (*LEARNT, *by_source(record))} for step, record in steps.items()},
        evaluations=evaluations,
        arrays=arrays_of(checkpoint),
        data=json.loads(data.read_text()),
    )


def records(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a file by their step, none of which is there twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    assert len(by_step) == len(lines), f"{path}: a step is there twice"
    return by_step


def by_source(record: Iterable[str]) -> list[str]:
    return sorted(name for name in record if name.startswith(("tokens/", "epoch/")))


def arrays_of(checkpoint: Path) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their names, as TensorStore reads them."""
    state = checkpoint.absolute() / "state"
    store = {"driver": "ocdbt", "base": f"file://{state}/"}
    keys = tensorstore.KvStore.open(store).result().list().result()
    names = sorted(key.decode().removesuffix("/zarr.json") for key in keys if key.endswith(b"/zarr.json"))
    assert names
    return {
        name: np.asarray(
            tensorstore.open({"driver": "zarr3", "kvstore": store | {"path": f"{name}/"}}, read=True)
            .result()
            .read()
            .result()
        )
        for name in names
    }


def assert_same(found: History, wanted: History, *, rtol: float = 0.0) -> None:
    """Of losses and arrays within `rtol`, bitwise where that is 0; all else is always the same."""
    assert found.data == wanted.data
    for ours, theirs in ((found.steps, wanted.steps), (found.evaluations, wanted.evaluations)):
        assert ours.keys() == theirs.keys()
        for step in theirs:
            assert ours[step].keys() == theirs[step].keys()
            for name, value in theirs[step].items():
                assert_close(ours[step][name], value, rtol, f"{name} of step {step}")
    assert found.arrays.keys() == wanted.arrays.keys()
    for name, array in wanted.arrays.items():
        assert_close(found.arrays[name], array, rtol, name)


def assert_close(found: Any, wanted: Any, rtol: float, name: str) -> None:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    if rtol and np.issubdtype(wanted.dtype, np.floating):
        # Of the whole array: an element near 0 may be anything.
        scale = np.linalg.norm(wanted)
        assert np.linalg.norm(found - wanted) <= rtol * scale, (name, np.linalg.norm(found - wanted), scale)
    else:
        assert found.tobytes() == wanted.tobytes(), name


def entered(handed: Path) -> dict[int, dict[str, str]]:
    """Digests of the rows of every batch that is in the state of a run in the end, in order, by the batch's number.

    A process that goes on from a checkpoint is handed the batch after those that the checkpoint knows; what was handed
    out behind that before was lost with the process.
    """
    lines = [json.loads(line) for line in handed.read_text().splitlines()]
    in_state: list[int] = []
    rows: dict[int, dict[str, str]] = {}
    for line in lines:
        # A later process is handed the same rows, or what it is handed counts.
        rows.setdefault(line["batch"], {}).update(line["rows"])
        if line["process"] == 0:
            in_state = [batch for batch in in_state if batch <= line["after"]]
            assert (in_state or [-1])[-1] == line["after"], f"batch {line['after']} was never handed out"
            in_state.append(line["batch"])
    return {batch: dict(sorted(rows[batch].items(), key=lambda row: int(row[0]))) for batch in in_state}
