"""Type and range checks of config dataclasses, with one-line errors. Imports no JAX."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal


class ConfigError(ValueError):
    """The user's configuration is wrong. `path` is dotted (`model.pattern.2.mixer.window`)."""

    def __init__(self, path: str, message: str):
        super().__init__(path, message)
        self.path, self.message = path, message

    def __str__(self) -> str:
        return f"{self.path}{self.message}"

    def under(self, parent: str) -> "ConfigError":
        """The same error seen from one level further out."""
        return ConfigError(f"{parent}.{self.path}" if self.path else parent, self.message)


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, used as `Annotated[int, Range(1)]`; `above` excludes `low` itself."""

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False

    def violation(self, value: float) -> str | None:
        if not math.isfinite(value):
            return "must be finite"
        if self.above and value <= self.low:
            return f"must be above {self.low}"
        if value < self.low:
            return f"must be at least {self.low}"
        if value > self.high:
            return f"must be at most {self.high}"
        return None


PositiveInt = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
PositiveFloat = Annotated[float, Range(0, above=True)]
NonNegativeFloat = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


class Node:
    """Base of every config dataclass: checks its fields' types and ranges when it is made.

    Subclasses add cross-field rules by overriding `check` and raising `ConfigError`.
    """

    def __post_init__(self) -> None:
        for name, hint in field_types(type(self)).items():
            if problem := violation(getattr(self, name), hint):
                raise ConfigError(name, problem)
        self.check()

    def check(self) -> None:
        """Cross-field rules; the base has none."""


@functools.cache
def field_types(cls: type[Node]) -> dict[str, Any]:
    """The annotation of every field, ranges included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]


def violation(value: Any, hint: Any) -> str | None:
    """What is wrong with `value` where `hint` is expected (`=7: must be at most 1`), or None."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        problem = violation(value, args[0])
        if problem is None:
            for rule in args[1:]:
                if isinstance(rule, Range) and (broken := rule.violation(value)):
                    problem = f"={value!r}: {broken}"
        return problem
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in args:
            return None
        problems = [violation(value, arg) for arg in args if arg is not types.NoneType]
        return None if None in problems else problems[0]
    if origin is Literal:
        if value in args:
            return None
        return f"={value!r}: must be one of {', '.join(map(str, args))}{suggestion(str(value), map(str, args))}"
    if origin is tuple:
        if not isinstance(value, tuple):
            return _wrong_type("tuple", value)
        for i, item in enumerate(value):
            if problem := violation(item, args[0]):
                return f".{i}{problem}"
        return None
    if hint is float and type(value) is int:
        return None
    if hint in (int, float, bool, str):
        return None if type(value) is hint else _wrong_type(hint.__name__, value)
    if not isinstance(value, hint):
        return _wrong_type(hint.__name__, value)
    return None


def _wrong_type(expected: str, value: Any) -> str:
    return f"={value!r}: expected {expected}, got {type(value).__name__}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean window?` when something close to `word` is known, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    if not close:
        return ""
    # Swapped letters before other near misses: RGRLU is RGLRU, not ReGLU.
    return f"; did you mean {next((c for c in close if sorted(c) == sorted(word)), close[0])}?"
