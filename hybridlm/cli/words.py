"""Words of the command line, told apart and checked: what commands and launchers share."""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hybridlm.config_check import ConfigError


class Parser(argparse.ArgumentParser):
    """Reports errors as one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        command = self.prog.partition(" ")[2]
        raise ConfigError(command or "COMMAND", f": {message}; `{self.prog} --help` says more")


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is before and behind `--`."""
    words = list(argv)
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def split_fields(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that are not about fields of the config; and `--a.b=1` or `--a.b 1` as `a.b=1`."""
    others, assignments, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if not re.match(r"--\w[\w-]*\.", word):
            others.append(word)
            continue
        if "=" not in word:
            if not words or words[0].startswith("--"):
                raise ConfigError(word, ": needs a value, such as --train.steps=100")
            word = f"{word}={words.pop(0)}"
        assignments.append(word.removeprefix("--"))
    return others, assignments


def check_json(path: Path | None) -> None:
    check_file("--json", path)


def check_file(option: str, path: Path | None) -> None:
    """Raise ConfigError where nothing can be written at `path`."""
    if path is not None and not path.parent.is_dir():
        raise ConfigError(f"{option} {path}", f": no directory {path.parent}; make it first")
    if path is not None and path.is_dir():
        raise ConfigError(f"{option} {path}", ": is a directory; name a file in it")
    if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}", ": cannot be written; name a file that can be")


def write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path}", f": cannot be written: {error.strerror}") from None
