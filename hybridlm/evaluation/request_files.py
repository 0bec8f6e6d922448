"""Files of requests: JSON lines, also gzipped, whose mistakes are named by line."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from hybridlm.config_check import ConfigError

OPTION = "--task-file"


def refuse(path: Path, problem: str, line: int | None = None) -> NoReturn:
    """Raise ConfigError about a file, or a line of it."""
    where = "" if line is None else f":{line}"
    raise ConfigError(f"{OPTION} {path}{where}", f": {problem}")


def objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of the file and their lines, from 1 on; empty lines are left out.

    Raises ConfigError where the file cannot be read, holds no line, or holds one that is no object.
    """
    number, found = 0, False
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found = True
                    yield number, _object(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        refuse(path, f"cannot be read after line {number} ({error}); give a file that is whole")
    if not found:
        refuse(path, "is empty; each line must hold one JSON object")


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        refuse(path, f"is not JSON ({error}); correct or remove the line", number)
    if not isinstance(record, dict):
        refuse(path, "is not a JSON object; each line must hold one", number)
    return record


def text_field(path: Path, number: int, record: dict[str, Any], *names: str) -> str:
    """The string at `record[names[0]][names[1]]...`, which must be UTF-8."""
    value: Any = record
    for depth, name in enumerate(names):
        if not isinstance(value, dict) or name not in value:
            refuse(path, f"has no field {'.'.join(names[: depth + 1])}; correct or remove the line", number)
        value = value[name]
    if not isinstance(value, str):
        refuse(path, f"{'.'.join(names)} must be a string, not {type(value).__name__}", number)
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(path, f"{'.'.join(names)} holds half a surrogate pair, which is no character", number)
    return value
