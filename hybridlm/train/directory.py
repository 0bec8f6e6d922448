"""A run's directory: what it holds, whether it may be used, and what a person wants to know of it.

`config.json`, `environment.json`, `metrics.jsonl`, `eval.jsonl`, `samples.jsonl`, `events.jsonl`, `goodput.json`,
`run.lock`, `tensorboard/`, `checkpoints/`, and `origin.json` of one made from another.
"""

import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError
from hybridlm.distributed import agreed, is_first
from hybridlm.flops import idle_parameters
from hybridlm.train.lock import DirectoryLock
from hybridlm.train.sizes import parameters_by_part
from hybridlm.train.steps import complete_steps

# What a resumed run may change: nothing of it is in the state or in the order of the data.
CHANGEABLE = (
    "train.steps",
    "train.log_every",
    "train.max_nonfinite_steps",
    "train.spike_sigma",
    "train.rollbacks",
    "train.hang_seconds",
    "train.compare_replicas_every",
    "eval.",
    "checkpoint.",
    "sharding.",
    "kernels.",
    "data.prefetch",
    "data.workers",
    "data.stages",
    "data.path",
    "data.mixture.*.path",
)


ORIGIN = "origin.json"
"""In the directory of a run made from another: the command that made it, that run, and its step."""


SECRET = re.compile(
    r"(^-*key|(^|[._-])(token|secret|passw(or)?d|passphrase|credentials?"
    r"|(access|api|encryption|private|secret|signing|ssh)[_-]?key))$",
    re.IGNORECASE,
)
"""Names whose value is a secret, by how they end: `--hub.token` and `API_KEY`, not `--data.text-key`."""
REDACTED = "[redacted]"


@contextlib.contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Makes `directory` and keeps other runs out of it, in all processes of this one.

    Raises ConfigError where another run is going on there or nothing can be written.
    """
    with contextlib.ExitStack() as stack:
        refusal = None
        if is_first():
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(DirectoryLock(directory))
            except OSError as error:
                refusal = not_writable(directory, error)
            except ConfigError as error:
                refusal = error
        if agreed(refusal is not None):
            raise refusal or ConfigError(str(directory), ": cannot be used, as the first process says")
        yield


def not_writable(directory: Path, error: OSError) -> ConfigError:
    return ConfigError(str(directory), f": cannot be written to: {error.strerror}; choose another --out")


def prepare(config: Config, directory: Path, *, fresh: bool) -> None:
    """Make `directory` ready for `config`, or raise ConfigError: it is not writable, holds a run that `fresh` forbids
    to go on with, or holds a run of another config.
    """
    has_checkpoint = bool(complete_steps(directory / "checkpoints"))
    if has_checkpoint and fresh:
        raise ConfigError(str(directory), ": holds a checkpoint and --fresh refuses to resume; choose another --out")
    saved = directory / "config.json"
    if has_checkpoint and saved.exists():
        if refused := unchangeable(config_io.load_json(saved), config):
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
        raise not_writable(directory, error) from None


def write_origin(directory: Path, origin: dict[str, Any]) -> None:
    """Written beside and then renamed."""
    partial = directory / f"{ORIGIN}.partial"
    partial.write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    partial.replace(directory / ORIGIN)


def origin_of(directory: Path) -> dict[str, Any] | None:
    """What a run was made from; None for one that began at random parameters."""
    path = directory / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def check_has_begun(directory: Path) -> None:
    """Raise ConfigError where a run that does not begin at random parameters has no checkpoint to go on from."""
    origin = origin_of(directory)
    if origin is not None and not complete_steps(directory / "checkpoints"):
        raise ConfigError(
            str(directory),
            f": begins with the parameters of {origin['run']} and has no checkpoint yet; give the command "
            f"`hybridlm {origin['command']}` again",
        )


def unchangeable(old: Config, new: Config) -> list[str]:
    """The fields that differ and must not, a line each."""
    return [
        change for change in config_io.diff(old, new) if not re.sub(r"\.\d+\b", ".*", change).startswith(CHANGEABLE)
    ]


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
        "command": without_secrets(sys.argv),
    }


def record_model(directory: Path, config: Config, mesh: jax.sharding.Mesh, params: Any) -> None:
    """Add to `environment.json` the devices along each axis of the mesh, and the parameters by part of the model."""
    path = directory / "environment.json"
    told = json.loads(path.read_text())
    told |= {
        "mesh": dict(mesh.shape),
        "parameters": parameters_by_part(config.model, params),
        "idle_parameters": idle_parameters(config.model),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(told, indent=2) + "\n")
    os.replace(temporary, path)


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line without the values of options that are named like secrets, and without those within URLs."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("-")
        if hide and not is_option:
            word = REDACTED
        hide = False
        if SECRET.search(name) and (is_option or equals):
            word, hide = (f"{name}={REDACTED}", False) if equals else (word, True)
        word = re.sub(r"(://)[^/@\s]+@", rf"\1{REDACTED}@", word)  # user and password
        shown.append(re.sub(r"(://[^?\s]*\?)\S+", rf"\1{REDACTED}", word))  # signatures
    return shown


def installed_version(package: str) -> str | None:
    """None for a package that is only on the path, such as our own in a checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
