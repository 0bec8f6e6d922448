"""Checkpoints with Orbax: training state, data position and config, committed together or not at all."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from hybridlm.config_check import ConfigError
from hybridlm.train.step import TrainState

FORMAT = 2
"""Of the training state. Parameters alone can be read from checkpoints of other formats too."""
# Orbax takes any directory named by a number for a checkpoint; these files it writes before the commit.
PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "data", "config")


class Checkpoints:
    """The checkpoints of one run. Use as a context manager; leaving it waits for the save in progress."""

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        logging.getLogger("absl").addFilter(_holds_no_stack)
        sys.unraisablehook = _unless_given_up
        set_aside_incomplete(directory)
        training: Any = ocp.training  # whose annotations refuse its own policies
        self._checkpointer = training.Checkpointer(
            str(directory.absolute()),
            context=_context(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=training.preservation_policies.LatestN(keep),
        )
        self._saving: Any = None
        self._step: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        # Orbax raises a failed save once more here, in the way of the error that is being raised.
        passed_over = contextlib.nullcontext() if exception[0] is None else contextlib.suppress(OSError, ValueError)
        with passed_over:
            self.wait()
            self._checkpointer.close()

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data: dict[str, Any], config: dict[str, Any]) -> None:
        """Start saving, unless this step is saved already; returns as soon as the arrays are copied."""
        self.wait()
        if self.latest_step() == step:
            return
        parts = {"state": state, "data": data, "config": config | {"format": FORMAT}}
        self._step = step
        with self._telling_failures():
            self._saving = self._checkpointer.save_checkpointables_async(step, parts)

    def wait(self) -> None:
        """Wait for the save in progress. Raises OSError where it failed, as on a full disk."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with self._telling_failures():
                saving.result()

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
        """The latest state, laid out like `abstract` (shapes, dtypes and shardings), and its data position.

        Raises ConfigError where another version of the program wrote it in another format.
        """
        step = self.latest_step()
        written = self._checkpointer.load_checkpointables(step, {"config": None})["config"]["format"]
        if written != FORMAT:
            raise ConfigError(
                str(self.directory / str(step)),
                f": was written in format {written}, and this version goes on from format {FORMAT}; go on with the "
                "version that began it (evaluation and generation can read it as it is)",
            )
        loaded = self._checkpointer.load_checkpointables(step, {"state": abstract, "data": None})
        return loaded["state"], loaded["data"]

    def restore_params(self, abstract: Any) -> Any:
        """The latest parameters alone. Raises ConfigError where their names or shapes are not those of `abstract`."""
        step = self.latest_step()
        if step is None:
            raise ConfigError(str(self.directory), ": holds no complete checkpoint; train first")
        path = str(self.directory.absolute() / str(step))
        with _context(partial=True):
            stored = _shapes(ocp.metadata(path, checkpointable_name="state").metadata["params"])
            for name, shape in _shapes(abstract).items():
                if stored.get(name) != shape:
                    has = f"has {name} of shape {stored[name]}" if name in stored else f"has no {name}"
                    raise ConfigError(
                        path, f": {has}, not {shape} as the config asks for; leave the run's model.* as they are"
                    )
            return ocp.load(path, {"params": abstract}, checkpointable_name="state")["params"]


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(x.shape) for path, x in leaves}


def set_aside_incomplete(directory: Path) -> None:
    """Rename what looks like a checkpoint but was never committed, so that it is neither read nor in the way."""
    if jax.process_index() != 0 or not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.name.isdigit() and not is_complete(path):
            os.replace(path, path.with_name(f"incomplete.{path.name}"))
            print(f"{path} is incomplete; it is set aside as incomplete.{path.name}", flush=True)


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that was committed."""
    return path.name.isdigit() and all((path / part).exists() for part in PARTS)


def abstract_state(init: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, dtypes and shardings of what `init()` would return on `mesh`."""

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        spec = jax.sharding.PartitionSpec() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(leaf, jax.eval_shape(init))


def _holds_no_stack(record: logging.LogRecord) -> bool:
    """Orbax logs the stacks of all threads that an error passes through, and then raises it: once is enough."""
    return not record.exc_info


_report_unraisable = sys.unraisablehook


def _unless_given_up(unraisable: Any) -> None:
    """Orbax closes its event loop at the first write that fails; TensorStore prints a stack for every other one."""
    if str(unraisable.exc_value) != "Event loop is closed":
        _report_unraisable(unraisable)


def _context(partial: bool = False) -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry(include_global_registry=True)
    for name in ("data", "config"):
        # Without this a dict of numbers is saved as arrays.
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    context.pytree.loading.partial_load = partial
    return context
