"""Whether the files of a checkpoint, and the arrays in them, are what was written.

After a checkpoint is committed every process writes `_integrity.<i>-of-<n>.json` into it: sizes and BLAKE2b digests of
the files that it wrote. Nothing in here is a collective operation but `told_by_any`, so that what one process finds can
be agreed upon before any other code waits for all of them.
"""

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
import tensorstore
from jax.experimental import multihost_utils

from hybridlm.train import fingerprint

SIDECAR = re.compile(r"_integrity\.\d+-of-\d+\.json")
PARTIAL = re.compile(r"\..*\.partial")
"""What `write_whole` has not finished, in this process or in another."""
WRITTEN_BY = re.compile(r"ocdbt\.process_(\d+)")
READ_BYTES = 1 << 20
PIECE_BYTES = 64 << 20
"""Of an array that is read at once."""
THREADS = min(8, os.cpu_count() or 1)
TOLD_BYTES = 400


def files_of(step_dir: Path) -> Iterator[str]:
    """The files of a checkpoint by their relative names, sidecars apart; links are named, not followed.

    A sidecar that another process is about to write is none of them: soon it has another name.
    """
    for root, _, names in os.walk(step_dir):
        for name in names:
            relative = Path(root, name).relative_to(step_dir).as_posix()
            if not SIDECAR.match(relative) and not PARTIAL.fullmatch(relative):
                yield relative


def write_sidecar(step_dir: Path, process: int, processes: int) -> None:
    """Hash the files that `process` of so many wrote, and write its sidecar. A checkpoint that is gone is let go."""
    try:
        own = sorted(name for name in files_of(step_dir) if _written_by(name) % processes == process)
        with ThreadPoolExecutor(max(1, THREADS // 4)) as pool:  # beside a training run, which needs processors as well
            hashed = pool.map(lambda name: _hashed(step_dir / name), own)
            files = {name: {"size": size, "blake2b": digest} for name, (size, digest) in zip(own, hashed, strict=True)}
        name = f"_integrity.{process}-of-{processes}.json"
        write_whole(step_dir / name, json.dumps({"files": files, "digest": digest_of(files)}, indent=1) + "\n")
    except FileNotFoundError:
        if step_dir.is_dir():
            raise


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there with all of its content or not at all, even after a loss of power."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def digest_of(value: Any) -> str:
    """Of what JSON can say, however its objects are ordered."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_sidecars(step_dir: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What the sidecars of a checkpoint say of its files, and one line for each that cannot be believed."""
    files: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path in sorted(path for path in step_dir.iterdir() if SIDECAR.fullmatch(path.name)):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            whole = said["digest"] == digest_of(said["files"]) and all(map(_is_inside, said["files"]))
        except (ValueError, KeyError, TypeError):
            whole, said = False, {}
        if whole:
            files |= said["files"]
        else:
            problems.append(f"{path.name} is damaged")
    return files, problems


def damaged_files(step_dir: Path, files: Mapping[str, Mapping[str, Any]], share: slice = slice(None)) -> Iterator[str]:
    """One line for each of `files`, or of this share of them, that is not what its sidecar says."""
    # By size, so that shares [i::n] are of similar size.
    names = sorted(files, key=lambda name: (files[name]["size"], name))[share]

    def problem(name: str) -> str | None:
        path, said = step_dir / name, files[name]
        try:
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no regular file"
            if found.st_size != said["size"]:
                return f"{name} has {found.st_size:,} bytes, not {said['size']:,}"
            return None if _hashed(path)[1] == said["blake2b"] else f"{name} has another checksum"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"

    with ThreadPoolExecutor(THREADS) as pool:
        yield from filter(None, pool.map(problem, names))


def uncovered(step_dir: Path, files: Mapping[str, Any]) -> list[str]:
    """The files of a checkpoint that no sidecar tells of."""
    return sorted(set(files_of(step_dir)) - set(files))


def stored_pieces(state_dir: Path, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """An array of a checkpoint in pieces of about `PIECE_BYTES`, each with its first element's number.

    Read without Orbax, whose loading is a collective operation of all processes.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": f"file://{state_dir.absolute()}/", "path": f"{name}/"},
    }
    stored = tensorstore.open(spec, open=True, read=True).result()
    if stored.rank == 0:
        yield 0, np.asarray(stored.read().result())
        return
    row = math.prod(stored.shape[1:])
    # Whole chunks, each of which is read and decompressed as one.
    chunk = stored.chunk_layout.read_chunk_template.shape[0]
    rows = chunk * max(1, PIECE_BYTES // max(1, chunk * row * stored.dtype.numpy_dtype.itemsize))
    for start in range(0, stored.shape[0], rows):
        yield start * row, np.asarray(stored[start : min(start + rows, stored.shape[0])].read().result())


def damaged_arrays(
    state_dir: Path,
    wanted: Mapping[str, Mapping[str, Any]],
    names: list[str],
    look: Callable[[str, np.ndarray], None] = lambda name, piece: None,
) -> Iterator[str]:
    """One line for each of the arrays `names` that cannot be read or has another fingerprint; `look` sees it all."""

    def problem(name: str) -> str | None:
        total = np.zeros(2, np.uint32)
        try:
            for first, piece in stored_pieces(state_dir, name):
                total += fingerprint.of_host(piece, first)
                look(name, piece)
        except (ValueError, OSError) as error:
            return f"{name} cannot be read: {first_line(error)}"
        return None if fingerprint.as_text(total) == wanted[name]["fingerprint"] else f"{name} has another fingerprint"

    with ThreadPoolExecutor(max(1, THREADS // 2)) as pool:
        yield from filter(None, pool.map(problem, names))


def first_line(error: BaseException) -> str:
    """What an error was, from the one that caused it: Orbax's own say that a handler is incompatible."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0][:300]


def told_by_any(problem: str | None) -> str | None:
    """The first problem that any process has, the same for all. All must call."""
    if jax.process_count() == 1:
        return problem
    own = np.zeros(TOLD_BYTES, np.uint8)
    text = (problem or "").encode()[:TOLD_BYTES]
    own[: len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, TOLD_BYTES)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in told)
    return next((text for text in texts if text), None)


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true in time: shared file systems show late what another process did."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _written_by(name: str) -> int:
    found = WRITTEN_BY.search(name)
    return int(found[1]) if found else 0


def _hashed(path: Path) -> tuple[int, str]:
    digest, size = hashlib.blake2b(digest_size=16), 0
    # A link could lead to a file that never ends.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
