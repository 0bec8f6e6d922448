"""Seconds per GB to save, restore and verify a state, and for how long saving holds up training, beside plain Orbax.

Seconds of processors are shown as well, of all threads: on a machine that does other things they vary less.

    python kernels/benchmarks/checkpoints.py --gb 0.5

The memory is what the process holds at most while it saves beyond what it held before, bytes per byte of the state.

Plain Orbax saves the same arrays, scanned layers in one array each, with its defaults, and checks nothing. The numbers
are those of the CPU and the disk that this runs on, and contain random mantissas, which do not compress.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from hybridlm.config import Attention, Block, Checkpoint, Mesh, Model
from hybridlm.sharding import make_mesh
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.step import TrainState
from hybridlm.train.verify import checkpoints_of

LAYERS = 12
PARTS = ("save", "stall", "restore", "verify", "memory")
MODEL = Model(
    vocab_size=8,
    width=8,
    num_layers=LAYERS,
    pattern=(Block(mixer=Attention(num_heads=2, num_kv_heads=1), ffn=None),),
)


def make_state(gigabytes: float, mesh: jax.sharding.Mesh) -> TrainState:
    """Parameters and two moments, most of them in scanned layers, spread over all devices."""
    rows = int(gigabytes * 1e9 / (3 * 4 * 1024 * (4 * LAYERS + 4))) // 8 * 8
    key = np.random.default_rng(0)

    def put(shape: tuple[int, ...], *spec: Any) -> jax.Array:
        return jax.device_put(key.standard_normal(shape, np.float32), jax.NamedSharding(mesh, jax.P(*spec)))

    def params() -> dict[str, Any]:
        block = {f"w_{i}": put((LAYERS, rows, 1024), None, "fsdp", None) for i in range(4)}
        return {"embedding": put((4 * rows, 1024), "fsdp", None), "stack": {"repeats": {0: block}}}

    count = jax.device_put(np.int32(0), jax.NamedSharding(mesh, jax.P()))
    return TrainState(count, params(), (params(), params()), count, count, {})


class Measured(NamedTuple):
    parts: dict[str, "Seconds"]
    save_bytes: int
    """Beyond what the process held before."""


class Seconds(NamedTuple):
    """Of a clock, and of processors, all threads together."""

    wall: float
    processors: float


def ours(directory: Path, state: TrainState, settings: Checkpoint) -> Measured:
    with Checkpoints(directory / "checkpoints", MODEL, settings) as checkpoints, growth() as grown:
        stall, _ = timed(lambda: checkpoints.save(1, state, {}, {}))
        rest, _ = timed(checkpoints.wait)
    abstract = abstract_of(state)
    with Checkpoints(directory / "checkpoints", MODEL, settings) as checkpoints:
        restore, _ = timed(lambda: jax.block_until_ready(checkpoints.restore(abstract)[0]))
    verify, rows = timed(lambda: checkpoints_of(directory, verify=True))
    assert [row["state"] for row in rows] == ["whole"], rows
    save = Seconds(*map(sum, zip(stall, rest, strict=True)))
    return Measured({"save": save, "stall": stall, "restore": restore, "verify": verify}, grown[0])


def plain(directory: Path, state: TrainState, _: Checkpoint) -> Measured:
    abstract = abstract_of(state)
    with ocp.training.Checkpointer(str(directory)) as checkpointer:
        with growth() as grown:
            stall, response = timed(lambda: checkpointer.save_async(1, state))
            rest, _ = timed(response.result)
        restore, _ = timed(lambda: jax.block_until_ready(checkpointer.load(1, abstract)))
    save = Seconds(*map(sum, zip(stall, rest, strict=True)))
    return Measured({"save": save, "stall": stall, "restore": restore}, grown[0])


@contextmanager
def growth() -> Iterator[list[int]]:
    """By how many bytes this process grows at most: one number, once the block has ended."""
    before, done, found = resident_bytes(), Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], resident_bytes() - before)

    watching = Thread(target=watch)
    watching.start()
    try:
        yield found
    finally:
        done.set()
        watching.join()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def abstract_of(state: TrainState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def timed(function: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, processors = time.monotonic(), time.process_time()
    result = function()
    return Seconds(time.monotonic() - wall, time.process_time() - processors), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.5, help="size of the state")
    parser.add_argument("--repeats", type=int, default=3, help="of which the best is shown; one more warms up")
    parser.add_argument("--buffer-gb", type=float, help="checkpoint.buffer_gb of ours (default: the field's)")
    parser.add_argument("--directory", type=Path, help="of the disk to measure (default: the one for temporary files)")
    args = parser.parse_args()
    settings = Checkpoint() if args.buffer_gb is None else Checkpoint(buffer_gb=args.buffer_gb)
    mesh = make_mesh(Mesh(data=1, fsdp=-1))
    with jax.set_mesh(mesh):
        state = make_state(args.gb, mesh)
        size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
        devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
        print(f"{size:.2f} GB on {devices}; seconds per GB: clock (processors)")
        print(f"{'':12}" + "".join(f"{part:>14}" for part in PARTS))
        for name, measure in (("hybridlm", ours), ("plain Orbax", plain)):
            runs = []
            for _ in range(args.repeats + 1):
                directory = Path(tempfile.mkdtemp(dir=args.directory))
                try:
                    runs.append(measure(directory, state, settings))
                finally:
                    shutil.rmtree(directory)
            best = {
                part: [min(column) / size for column in zip(*(run.parts[part] for run in runs[1:]), strict=True)]
                for part in runs[0].parts
            }
            cells = {part: f"{wall:.2f} ({processors:.2f})" for part, (wall, processors) in best.items()}
            # What was freed may stay with the process and be taken again without growing.
            cells["memory"] = f"{max(run.save_bytes for run in runs) / 1e9 / size:.2f}"
            print(f"{name:12}" + "".join(f"{cells.get(part, ''):>14}" for part in PARTS))


if __name__ == "__main__":
    main()
