"""A run's directory: what it holds, whether it may be used, and what a person wants to know of it.

`config.json`, `environment.json`, `metrics.jsonl`, `eval.jsonl`, `tensorboard/`, `checkpoints/`.
"""

import json
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.train.checkpoint import is_complete

# What a resumed run may change: nothing of it is in the state or in the order of the data.
CHANGEABLE = (
    "train.steps",
    "train.log_every",
    "train.max_nonfinite_steps",
    "eval.",
    "checkpoint.",
    "sharding.",
    "kernels.",
    "data.prefetch",
    "data.path",
)


def prepare(config: Config, directory: Path, *, fresh: bool) -> None:
    """Make `directory` ready for `config`, or raise ConfigError: it is not writable, holds a run that `fresh` forbids
    to go on with, or holds a run of another config.
    """
    has_checkpoint = any(map(is_complete, (directory / "checkpoints").glob("*")))
    if has_checkpoint and fresh:
        raise ConfigError(str(directory), ": holds a checkpoint and --fresh refuses to resume; choose another --out")
    saved = directory / "config.json"
    if has_checkpoint and saved.exists():
        changes = config_io.diff(config_io.load_json(saved), config)
        refused = [change for change in changes if not change.startswith(CHANGEABLE)]
        if refused:
            raise ConfigError(
                str(directory),
                f": holds a run of another config ({'; '.join(refused[:3])}{'; ...' if len(refused) > 3 else ''}); "
                "choose another --out, or the run's own config",
            )
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            (directory / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(str(directory), f": cannot be written to: {error.strerror}; choose another --out") from None


def environment() -> dict[str, object]:
    """Versions and devices of this process; no environment variables, which may hold secrets."""
    packages = ("hybridlm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in packages},
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "command": sys.argv,
    }


def installed_version(package: str) -> str | None:
    """None for a package that is only on the path, such as our own in a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
