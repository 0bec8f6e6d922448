"""Compiled training steps in files: `hybridlm plan --save` writes one, `hybridlm train --executable` runs it.

A file is a line of JSON that says what the executable is of, and JAX's serialisation of it. It is used where all of
that agrees with the run, down to the lowered program, and is refused where anything differs.

An executable is machine code: load only what comes from a place that you would run a program from.
"""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
from hybridlm_kernels.jax_compat import PayloadError, deserialize_executable, serialize_executable

from hybridlm import config_io
from hybridlm.config import Config
from hybridlm.config_check import ConfigError

FORMAT = 1
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
"""Whose versions an executable depends on, those that are installed."""
COMPILERS = {"cpu": ("jax", "jaxlib"), "tpu": ("jax", "jaxlib", "libtpu"), "gpu": PACKAGES[:2] + PACKAGES[3:]}


def save_executable(
    path: Path, compiled: jax.stages.Compiled, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh, config: Config
) -> int:
    """Write the step to `path`, beside it first and then renamed. Returns the bytes of the file."""
    payload = serialize_executable(compiled)
    header = description(lowered, mesh) | {
        "payload_bytes": len(payload),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
        "config": config_io.to_dict(config),
    }
    partial = path.with_name(path.name + ".partial")
    content = json.dumps(header).encode() + b"\n" + payload
    partial.write_bytes(content)
    partial.replace(path)
    return len(content)


def load_executable(path: Path, lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> jax.stages.Compiled:
    """The step in `path`, ready to run on the devices of `mesh`.

    Raises ConfigError where `path` holds no executable, a damaged one, or one of something else than `lowered` compiled
    here.
    """
    where = f"--executable {path}"
    try:
        line, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ConfigError(where, f": cannot be read: {error.strerror}") from None
    header = _header(where, line)
    for name, mine in description(lowered, mesh).items():
        theirs = header.get(name)
        if theirs != mine:
            raise ConfigError(where, f": {_difference(name, theirs, mine)}; plan it again, or leave --executable out")
    if header.get("payload_sha256") != hashlib.sha256(payload).hexdigest():
        raise ConfigError(
            where, f": is damaged: {len(payload):,} of {header.get('payload_bytes', 0):,} bytes are there"
        )
    try:
        return deserialize_executable(payload, lowered, list(mesh.devices.flat))
    except PayloadError as error:
        raise ConfigError(where, f": {error}") from None


def description(lowered: jax.stages.Lowered, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What has to agree between the executable and the run, in the order in which a person would look."""
    device = mesh.devices.flat[0]
    return {
        "format": FORMAT,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "num_devices": mesh.size,
        "mesh": dict(mesh.shape),
        "versions": versions(device.platform),
        "stablehlo_sha256": hashlib.sha256(lowered.as_text().encode()).hexdigest(),
    }


def versions(platform: str) -> dict[str, str]:
    """Of the packages that make an executable for `platform`, those that are installed."""
    found = {}
    for name in COMPILERS[platform]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _header(where: str, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "stablehlo_sha256" not in header:
        raise ConfigError(where, ": holds no executable; `hybridlm plan CONFIG --topology NAME --save FILE` writes one")
    return header


def _difference(name: str, theirs: Any, mine: Any) -> str:
    if name == "stablehlo_sha256":
        return "is of another program: the config or the code has changed since"
    if isinstance(theirs, dict) and isinstance(mine, dict):
        keys = [key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)]
        return ", ".join(
            f"was compiled with {key} {theirs.get(key, 'absent')}, here is {mine.get(key, 'none')}" for key in keys
        )
    return f"was compiled for {name} {theirs}, here is {mine}"
