"""The directories of checkpoints: `<step>`, or `incomplete.<step>` and `corrupt.<step>` where they must not be read."""

import itertools
import os
import re
import shutil
from pathlib import Path

import jax

from hybridlm.distributed import together

# Orbax takes any directory named by a number for a checkpoint; these files it writes before the commit.
PARTS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "data", "config")
STEP = re.compile(r"0|[1-9][0-9]*")


def is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint that was committed."""
    return STEP.fullmatch(path.name) is not None and all((path / part).exists() for part in PARTS)


def complete_steps(directory: Path) -> list[int]:
    """Of the checkpoints in a directory, in order."""
    return sorted(int(path.name) for path in directory.iterdir() if is_complete(path)) if directory.is_dir() else []


def set_aside_incomplete(directory: Path) -> None:
    """Rename what looks like a checkpoint but was never committed, so that it is neither read nor in the way.

    Those of earlier crashes are removed: over weeks they would fill the disk.
    """
    if jax.process_index() == 0 and directory.is_dir():
        incomplete = [path for path in directory.iterdir() if path.name.isdigit() and not is_complete(path)]
        if incomplete:
            for path in directory.glob("incomplete.*"):
                if path.is_symlink():
                    path.unlink()
                else:
                    shutil.rmtree(path)
        for path in incomplete:
            os.replace(path, path.with_name(f"incomplete.{path.name}"))
            print(f"{path} is incomplete; it is set aside as incomplete.{path.name}", flush=True)
    together("incomplete checkpoints are set aside")  # before others look for the latest


def set_aside_corrupt(path: Path) -> str:
    """Rename a damaged checkpoint to `corrupt.<step>`, or where there is one already `corrupt.<step>.2` and so on.

    Returns the new name. Where it is a link, that is what is renamed.
    """
    assert STEP.fullmatch(path.name), path
    names = itertools.chain((f"corrupt.{path.name}",), (f"corrupt.{path.name}.{i}" for i in itertools.count(2)))
    name = next(name for name in names if not os.path.lexists(path.with_name(name)))
    os.rename(path, path.with_name(name))
    return name
