"""`hybridlm checkpoints`: which checkpoints a run has, and whether they are what was saved. Needs no device."""

import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hybridlm.config_check import ConfigError
from hybridlm.train.integrity import damaged_arrays, damaged_files, files_of, read_sidecars, uncovered
from hybridlm.train.record import FINGERPRINTS, read_parts
from hybridlm.train.steps import STEP, is_complete

Row = dict[str, Any]
COLUMNS = {"name": "step", "written": "written", "gigabytes": "GB", "tokens": "tokens", "format": "format"}


def checkpoints_of(run_dir: Path, *, verify: bool) -> list[Row]:
    """One record for each checkpoint in order, those that were set aside included.

    Raises ConfigError where the run has no directory of checkpoints.
    """
    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(str(run_dir), ": holds no checkpoints; name the --out of a `hybridlm train`")

    def order(path: Path) -> tuple[int, str]:
        return int(next(part for part in path.name.split(".") if part.isdecimal())), path.name

    paths = [path for path in directory.iterdir() if path.is_dir() and _is_ours(path)]
    rows = [row_of(path, verify=verify) for path in sorted(paths, key=order)]
    return [row for row in rows if row is not None]


def row_of(path: Path, *, verify: bool) -> Row | None:
    """What is known of one; None where it is gone by now, as the oldest of a run that goes on."""
    try:
        size = sum((path / name).lstat().st_size for name in files_of(path))
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.lstat().st_mtime))
    except FileNotFoundError:
        return None
    row: Row = {"name": path.name, "written": written, "gigabytes": size / 1e9, "tokens": None, "format": None}
    if STEP.fullmatch(path.name) is None:
        return row | {"state": "set aside", "problems": []}
    if not is_complete(path):
        return row | {"state": "not complete", "problems": []}
    parts, problem = read_parts(path)
    saved = parts.get("config", {})
    row |= {"tokens": tokens_of(int(path.name), saved), "format": saved.get("format")}
    if not verify:
        return row | {"state": coverage_of(path), "problems": []}
    problems = damage_of(path, parts, problem)
    if not path.is_dir():
        return None
    if FINGERPRINTS not in parts and not problems:
        return row | {"state": "nothing to verify it by", "problems": []}
    return row | {"state": "damaged" if problems else "whole", "problems": problems}


def damage_of(path: Path, parts: dict[str, Any], problem: str | None) -> list[str]:
    """One line for each damaged thing: sizes, checksums, the data position and config, fingerprints, finite values."""
    files, problems = read_sidecars(path)
    problems += damaged_files(path, files)
    if problem is not None:
        return [*problems, problem]
    if FINGERPRINTS in parts:
        arrays = parts[FINGERPRINTS]["arrays"]
        not_finite: set[str] = set()

        def look(name: str, piece: np.ndarray) -> None:
            inexact = jnp.issubdtype(piece.dtype, jnp.inexact)
            if inexact and not np.isfinite(piece).all():
                not_finite.add(name)

        problems += damaged_arrays(path / "state", arrays, sorted(arrays), look)
        problems += [f"{name} has values that are not finite" for name in sorted(not_finite)]
    return problems


def coverage_of(path: Path) -> str:
    """How much of it can be verified by checksums."""
    files, problems = read_sidecars(path)
    if problems:
        return "damaged"
    missing = len(uncovered(path, files))
    if missing == 0:
        return "has checksums"
    return f"no checksums of {missing} files" if files else "no checksums"


def tokens_of(step: int, saved: dict[str, Any]) -> int | None:
    """That a run was trained on up to a step."""
    try:
        return step * saved["train"]["batch_size"] * saved["data"]["seq_len"]
    except (KeyError, TypeError):
        return None


def as_table(rows: list[Row]) -> str:
    """For people; below it one line for each damaged thing."""
    shown = [[*COLUMNS.values(), "state"]]
    for row in rows:
        tokens, version = row["tokens"], row["format"]
        shown.append(
            [
                row["name"],
                row["written"],
                f"{row['gigabytes']:.3f}",
                "-" if tokens is None else f"{tokens:,}",
                "-" if version is None else str(version),
                row["state"],
            ]
        )
    widths = [max(len(line[i]) for line in shown) for i in range(len(shown[0]))]
    lines = [
        "  ".join(
            [
                cell.ljust(width) if i in (0, 1, len(line) - 1) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ]
        ).rstrip()
        for line in shown
    ]
    return "\n".join([*lines, *(f"{row['name']}: {problem}" for row in rows for problem in row["problems"])])


def _is_ours(path: Path) -> bool:
    kind, _, step = path.name.partition(".")
    return STEP.fullmatch(path.name) is not None or (
        kind in ("corrupt", "incomplete") and STEP.fullmatch(step.partition(".")[0]) is not None
    )
