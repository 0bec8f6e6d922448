"""Checkpoints with Orbax: training state, data position and config, committed together or not at all.

What is restored is what was saved: files are compared with their checksums before Orbax reads them, and arrays with
their fingerprints afterwards. A damaged checkpoint is named and set aside, and the one before it is used.
"""

import contextlib
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from hybridlm import config
from hybridlm.config_check import ConfigError
from hybridlm.distributed import agreed, together
from hybridlm.finetune.adapters import ADAPTERS
from hybridlm.finetune.arrays import abstract_adapted, lora_of, merged_arrays
from hybridlm.model.by_layer import by_name
from hybridlm.train import layout
from hybridlm.train.integrity import (
    damaged_arrays,
    damaged_files,
    first_line,
    read_sidecars,
    told_by_any,
    uncovered,
    wait_until,
    write_sidecar,
)
from hybridlm.train.record import (
    FINGERPRINTS,
    FORMAT,
    Damaged,
    check_format,
    check_same,
    check_shapes,
    damage_of_arrays,
    describe,
    read_parts,
)
from hybridlm.train.step import TrainState
from hybridlm.train.steps import complete_steps, is_complete, set_aside_corrupt

SHOWN_SECONDS = 30.0
"""Within which a shared file system shows to all processes what one of them did."""


class Saved(NamedTuple):
    """A checkpoint that was committed."""

    step: int
    seconds: float
    """From the call of `save` until it was committed."""
    stall_seconds: float
    """For which `save` did not return, and no step was trained."""
    num_bytes: int
    """Of the state's arrays, over all processes."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager; leaving it waits for the save in progress."""

    def __init__(self, directory: Path, model: config.Model, checkpoint: config.Checkpoint):
        self.directory, self.model, self.config = directory, model, checkpoint
        self.set_aside: list[tuple[int, str]] = []
        """Steps whose checkpoints `restore` found damaged, and how."""
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_holds_no_stack)
        sys.unraisablehook = _unless_given_up
        # Of what Orbax had begun of a save that it then gave up.
        warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
        training: Any = ocp.training  # whose annotations refuse its own policies
        policies = training.preservation_policies
        kept = [policies.LatestN(checkpoint.keep)]
        if checkpoint.keep_every is not None:
            kept.append(policies.EveryNSteps(checkpoint.keep_every))
        self._checkpointer = training.Checkpointer(
            str(directory.absolute()),
            context=self._context(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(kept),
        )
        self._saving: Future[None] | None = None
        self._hashing: Future[None] | None = None
        self._step: int | None = None
        self._finished: list[Saved] = []

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        # Orbax raises a failed save once more here, in the way of the error that is being raised.
        passed_over = contextlib.nullcontext() if exception[0] is None else contextlib.suppress(OSError, ValueError)
        with passed_over:
            self.wait()
            self._wait_for_checksums()
            self._checkpointer.close()

    def latest_step(self) -> int | None:
        """Of those that were committed: to Orbax any directory named by a number is a checkpoint."""
        return max(complete_steps(self.directory), default=None)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Start saving, unless this step is saved already; returns as soon as the arrays are copied."""
        started = time.monotonic()
        self.wait()
        self._wait_for_checksums()  # before Orbax removes the directories that they are written to
        if self.latest_step() == step:
            return
        prints = layout.fingerprints(state, self.model)
        arrays = layout.flat(state, self.model)
        data, config = json.loads(json.dumps([data, config | {"format": FORMAT}]))
        record = describe(arrays, prints, data, config)
        num_bytes = sum(x.nbytes for x in arrays.values())
        largest = max(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in arrays.values())
        self._step = step
        with self._telling_failures(), self._context(at_least_bytes=2 * largest):
            parts = {"state": arrays, "data": data, "config": config, FINGERPRINTS: record}
            response = self._checkpointer.save_checkpointables_async(step, parts)
        stall = time.monotonic() - started

        def commit() -> None:
            response.result()
            self._finished.append(Saved(step, time.monotonic() - started, stall, num_bytes))

        self._saving = saving = _in_background(commit)
        self._hashing = _in_background(lambda: self._write_checksums(step, saving))

    def wait(self) -> None:
        """Wait for the save in progress. Raises OSError where it failed, as on a full disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._telling_failures():
                saving.result()

    def finished(self) -> list[Saved]:
        """The checkpoints that were committed since this was last asked."""
        finished = []
        while self._finished:
            finished.append(self._finished.pop(0))
        return finished

    def _wait_for_checksums(self) -> None:
        if self._hashing is not None:
            hashing, self._hashing = self._hashing, None
            hashing.result()

    def _write_checksums(self, step: int, saving: "Future[None]") -> None:
        if saving.exception() is not None or not wait_until(lambda: is_complete(self.path(step)), SHOWN_SECONDS):
            return
        try:
            write_sidecar(self.path(step), jax.process_index(), jax.process_count())
        except OSError as error:
            # The checkpoint is whole, and its fingerprints are within it.
            print(f"{self.path(step)}: no checksums of its files were written: {error}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _telling_failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError for what the file system refuses
            reason = str(error).partition("\n")[0]
            latest = self.latest_step()
            whole = "there is none before it" if latest is None else f"that of step {latest} is whole"
            raise OSError(f"the checkpoint of step {self._step} could not be saved; {whole}: {reason}") from error

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest whole state, laid out like `abstract` (shapes, dtypes and shardings), and its data position.

        Later ones, which are damaged, are renamed to `corrupt.<step>`, but only once another was restored: where all
        are found damaged, what is wrong may be the file system. Raises ConfigError then, and where another version of
        the program wrote it in another format, or the model is not that of `abstract`.
        """
        self.wait()
        self._wait_for_checksums()
        damaged: list[tuple[int, str]] = []
        for step in self._steps():
            try:
                restored = self._restored(self.path(step), abstract)
            except Damaged as damage:
                damaged.append((step, str(damage)))
            else:
                self._set_aside(damaged)
                return restored
        which = "; ".join(f"{step}: {problem}" for step, problem in damaged) or "there is none"
        raise ConfigError(
            str(self.directory),
            f": holds no whole checkpoint ({which}); repair one, or choose another --out to begin anew",
        )

    def _restored(self, path: Path, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position. Raises Damaged on all processes alike, each of which looks at a share."""
        share = slice(jax.process_index(), None, jax.process_count())
        _agree_on(self._damage_of_files(path, share))
        parts, problem = read_parts(path)
        _agree_on(problem)
        check_format(path, parts["config"])
        wanted, arrays = layout.flat_abstract(abstract, self.model), parts[FINGERPRINTS]["arrays"]
        check_same(path, arrays, wanted)
        if agreed(bool(uncovered(path, read_sidecars(path)[0]))):
            # No checksums say that all processes can read their parts, so each tries some arrays: Orbax would let the
            # others wait for one that cannot.
            _agree_on(next(damaged_arrays(path / "state", arrays, sorted(arrays)[share]), None))
        loaded, problem = self._loaded(path, wanted)
        _agree_on(problem)
        state = layout.stacked(loaded, abstract, self.model)
        _agree_on(damage_of_arrays(layout.fingerprints(state, self.model), arrays))
        return state, parts["data"]

    def restore_params(self, abstract: Any, step: int | None = None) -> Any:
        """The latest parameters alone, or those of `step`, in the form of `abstract`, with adapters added to the
        matrices that have some.

        Raises ConfigError where they are damaged, or their names or shapes are not those of `abstract`. Nothing is
        renamed: a run may be writing here.
        """
        path = self._path_to_read(step)
        if not (path / FINGERPRINTS).exists():
            return self._restore_nested_params(path, abstract)
        with _telling_of_damage(path):
            return self._restored_params(path, {"params": abstract})["params"]

    def reader_of_params(self, abstract: Any) -> Callable[[str], np.ndarray]:
        """What reads one of the latest parameters, by its name in a checkpoint without `params.`, as it is asked for.

        `abstract` are NumPy arrays in the place of all parameters. Those of a checkpoint with adapters, or of a format
        before 3, are read at once. Raises ConfigError as `restore_params` does, and so does what is returned.
        """
        path = self._path_to_read(None)
        if not (path / FINGERPRINTS).exists():
            return by_name(self.restore_params(abstract), self.model).__getitem__
        with _telling_of_damage(path):
            parts, problem = read_parts(path)
            _agree_on(problem)
        if lora_of(parts["config"]) is not None:
            return by_name(self.restore_params(abstract), self.model).__getitem__
        stored, wanted = parts[FINGERPRINTS]["arrays"], layout.flat_abstract({"params": abstract}, self.model)
        check_shapes(path, {name: tuple(said["shape"]) for name, said in stored.items()}, wanted)

        def read(name: str) -> np.ndarray:
            name = f"params.{name}"
            with _telling_of_damage(path):
                loaded, problem = self._loaded(path, {name: wanted[name]})
                _agree_on(problem)
                _agree_on(damage_of_arrays(layout.fingerprints(loaded, self.model), {name: stored[name]}))
            return loaded[name]

        return read

    def _path_to_read(self, step: int | None) -> Path:
        step = self.latest_step() if step is None else step
        if step is None:
            raise ConfigError(str(self.directory), ": holds no complete checkpoint; train first")
        return self.path(step)

    def _restored_params(self, path: Path, abstract: Any) -> Any:
        wanted = layout.flat_abstract(abstract, self.model)
        parts, problem = read_parts(path)
        _agree_on(problem)
        arrays = parts[FINGERPRINTS]["arrays"]
        lora = lora_of(parts["config"])
        if lora is not None and ADAPTERS not in abstract["params"]:
            with_adapters = {"params": abstract_adapted(lora, abstract["params"])}
            return {"params": merged_arrays(lora, self._restored_params(path, with_adapters)["params"])}
        check_shapes(path, {name: tuple(said["shape"]) for name, said in arrays.items()}, wanted)
        loaded, problem = self._loaded(path, wanted)
        _agree_on(problem)
        params = layout.stacked(loaded, abstract, self.model)
        _agree_on(damage_of_arrays(layout.fingerprints(params, self.model), {name: arrays[name] for name in wanted}))
        return params

    def _restore_nested_params(self, path: Path, abstract: Any) -> Any:
        """From a checkpoint of a format before 3, whose arrays lie in the form of the state."""
        with self._context(partial=True):
            stored = ocp.metadata(str(path.absolute()), checkpointable_name="state").metadata["params"]
            check_shapes(path, _shapes(stored), _by_name(abstract))
            return ocp.load(str(path.absolute()), {"params": abstract}, checkpointable_name="state")["params"]

    def _loaded(self, path: Path, wanted: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
        """The arrays of a checkpoint, or why they cannot be read."""
        largest = max(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in wanted.values())
        try:
            with self._context(partial=True, at_least_bytes=4 * largest):
                return ocp.load(str(path.absolute()), wanted, checkpointable_name="state"), None
        except jax.errors.JaxRuntimeError:
            raise  # of the devices, such as their memory being full
        except Exception as error:  # Orbax raises Exception itself
            return {}, first_line(error)

    def _steps(self) -> Iterator[int]:
        """The steps of the checkpoints, the latest first, as the first process sees them."""
        steps = sorted((one.step for one in self._checkpointer.checkpoints), reverse=True)
        if jax.process_count() == 1:
            yield from steps
            return
        count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
        padded = np.resize(np.asarray([*steps, 0], np.int32), count)
        yield from multihost_utils.broadcast_one_to_all(padded).tolist()

    def _damage_of_files(self, path: Path, share: slice) -> str | None:
        """What this process finds wrong with its share of the files."""
        if not wait_until(lambda: is_complete(path), SHOWN_SECONDS if jax.process_count() > 1 else 0.0):
            return "it is incomplete"
        files, _ = read_sidecars(path)
        return next(damaged_files(path, files, share), None)

    def _set_aside(self, damaged: list[tuple[int, str]]) -> None:
        for step, problem in damaged:
            if jax.process_index() == 0:
                name = set_aside_corrupt(self.path(step))
                print(f"{self.path(step)} is damaged: {problem}; it is set aside as {name}", flush=True)
        self.set_aside.extend(damaged)
        if damaged:
            together("damaged checkpoints are set aside")
            self._checkpointer.reload()

    def _context(self, *, partial: bool = False, at_least_bytes: int = 0) -> ocp.Context:
        """Orbax refuses arrays that are larger than its buffer, so that holds `at_least_bytes`."""
        context = ocp.Context()
        registry = ocp.handlers.local_registry(include_global_registry=True)
        for name in ("data", "config", FINGERPRINTS):
            # Without this a dict of numbers is saved as arrays.
            registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
        context.checkpointables.registry = registry
        context.pytree.loading.partial_load = partial
        buffer = max(int(self.config.buffer_gb * 1e9), at_least_bytes + 1)
        context.memory_options.write_concurrent_bytes = buffer
        context.memory_options.read_concurrent_bytes = buffer
        context.async_options.timeout_secs = self.config.timeout_seconds
        return context


@contextlib.contextmanager
def _telling_of_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except Damaged as damage:
        raise ConfigError(
            str(path), f": is damaged ({damage}); rename it to read the one before, as `hybridlm train` does"
        ) from None


def _agree_on(problem: str | None) -> None:
    """Raise Damaged on all processes where one has a problem."""
    if (told := told_by_any(problem)) is not None:
        raise Damaged(told)


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in _by_name(tree).items()}


def abstract_state(init: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings of what `init()` would return on `mesh`."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(init))


def _in_background(function: Callable[[], None]) -> "Future[None]":
    """Its thread does not keep a process alive that has to end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # raised by whoever asks for the result
            future.set_exception(error)
        else:
            future.set_result(None)

    Thread(target=run, daemon=True, name=function.__qualname__).start()
    return future


def _holds_no_stack(record: logging.LogRecord) -> bool:
    """Orbax logs the stacks of all threads that an error passes through, and then raises it: once is enough.

    Of writes that failed after the first, asyncio says that nobody asked.
    """
    return not record.exc_info


_report_unraisable = sys.unraisablehook


def _unless_given_up(unraisable: Any) -> None:
    """Orbax closes its event loop at the first read or write that fails; for every other one there is a stack."""
    if not str(unraisable.exc_value).startswith(
        ("Event loop is closed", "Encountered error while reading array index")
    ):
        _report_unraisable(unraisable)
