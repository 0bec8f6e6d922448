"""Configs in and out: JSON, dotted-path overrides, differences, recipe files. Imports no JAX.

In JSON every node carries its class as "type", looked up by name among the imported subclasses of the field's base
class, so a user's own mixer needs no entry anywhere; its module has to be imported first.
"""

import ast
import copy
import dataclasses
import functools
import json
import linecache
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from hybridlm.config import Config
from hybridlm.config_check import ConfigError, Node, field_types, suggestion
from hybridlm.config_tasks import TASKS

NodeT = TypeVar("NodeT", bound=Node)

PRETRAINED = "pretrained"
"""In the directory of a run that was imported: what came with the weights, its tokenizer among it."""


class FileError(ConfigError):
    """A ConfigError whose path already names the file, and the line where there is one."""


def to_dict(config: Node) -> dict[str, Any]:
    """Dicts, lists and scalars only, ready for JSON; `from_dict` is the inverse."""
    return _plain(config, lambda cls: cls.__name__)


def _plain(value: Any, type_of: Callable[[type], Any]) -> Any:
    if isinstance(value, Node):
        fields = {name: _plain(getattr(value, name), type_of) for name in field_types(type(value))}
        return {"type": type_of(type(value)), **fields}
    return [_plain(item, type_of) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: type[NodeT], data: Any, path: str = "") -> NodeT:
    """The `cls`, or subclass of it, that `data` describes; `path` is where it lies in a larger config, for errors."""
    if not isinstance(data, dict):
        raise ConfigError(path, f"={data!r}: expected an object with the fields of a {cls.__name__}")
    made = _class_named(data.get("type"), cls, path)
    hints = field_types(made)
    values = {}
    for name, item in data.items():
        if name == "type":
            continue
        if name not in hints:
            raise ConfigError(join(path, name), f": no such field{suggestion(name, hints)}")
        values[name] = _from_plain(hints[name], item, join(path, name))
    for field in dataclasses.fields(made):  # pyright: ignore[reportArgumentType]
        if field.name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(join(path, field.name), f": is required by {made.__name__}")
    try:
        return made(**values)
    except ConfigError as error:
        raise error.under(path) if path else error from None


def _from_plain(hint: Any, value: Any, path: str) -> Any:
    node = _node_class(hint)
    if node is not None and value is not None:
        return from_dict(node, value, path)
    if isinstance(value, list) and (item_hint := _item_hint(hint)) is not None:
        return tuple(_from_plain(item_hint, item, join(path, i)) for i, item in enumerate(value))
    return value


def _class_named(name: Any, base: type[NodeT], path: str) -> type[NodeT]:
    if isinstance(name, type):
        return name
    known: dict[str, list[type[NodeT]]] = {}
    for cls in (base, *_subclasses(base)):
        if dataclasses.is_dataclass(cls):
            known.setdefault(cls.__name__, []).append(cls)
    if name is None and dataclasses.is_dataclass(base):
        return base
    if name is None:
        raise ConfigError(join(path, "type"), f": is required; one of {', '.join(sorted(known))}")
    if name not in known:
        close = suggestion(str(name), known)
        way_out = close or f"; known are {', '.join(sorted(known))}, your own after the import of its module"
        raise ConfigError(join(path, "type"), f"={name!r}: no such {base.__name__}{way_out}")
    modules = sorted({cls.__module__ for cls in known[name]})
    if len(modules) > 1:
        raise ConfigError(join(path, "type"), f"={name!r}: {' and '.join(modules)} both define one; rename one of them")
    return known[name][-1]  # of one module run twice, the newer


def _subclasses(cls: type[NodeT]) -> Iterator[type[NodeT]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of a union, ranges stripped; a tuple of one for anything else."""
    if typing.get_origin(hint) is Annotated:
        return _alternatives(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(part for arg in typing.get_args(hint) for part in _alternatives(arg))
    return (hint,)


def _node_class(hint: Any) -> type[Node] | None:
    return next((h for h in _alternatives(hint) if isinstance(h, type) and issubclass(h, Node)), None)


def _item_hint(hint: Any) -> Any:
    return next((typing.get_args(h)[0] for h in _alternatives(hint) if typing.get_origin(h) is tuple), None)


def join(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def dump_json(config: Node, path: str | os.PathLike[str]) -> None:
    """Written beside and then renamed: a crash or a full disk leaves the old file or none, never half of one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def load_json(path: str | os.PathLike[str]) -> Config:
    """The Config that `dump_json` wrote. Raises ConfigError naming the file and the field."""
    try:
        config = from_dict(Config, json.loads(Path(path).read_text(encoding="utf-8")))
        return _with_own_tokenizer(config, Path(path).parent)
    except json.JSONDecodeError as error:
        raise FileError(f"{path}:{error.lineno}", f": is not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise FileError(str(path), f": is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise FileError(str(path), f": cannot be read: {error.strerror}") from None
    except ConfigError as error:
        raise FileError(f"{path}: {error.path}", error.message) from None


def _with_own_tokenizer(config: Config, run_dir: Path) -> Config:
    """`config` with the tokenizer that lies in its run's directory, where that has moved."""
    named = Path(config.data.tokenizer)
    own = run_dir / PRETRAINED / named.name
    if config.data.tokenizer == "byte" or named.exists() or not own.is_file():
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(own)))


def load_run_config(run_dir: str | os.PathLike[str]) -> Config:
    """The Config of a run directory. Raises ConfigError where it is none."""
    path = Path(run_dir) / "config.json"
    if not path.exists():
        reason = "holds no config.json, so it is no run directory" if path.parent.is_dir() else "no such run directory"
        raise ConfigError(str(run_dir), f": {reason}; `hybridlm train CONFIG --out {run_dir}` makes one")
    return load_json(path)


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything that is not itself made of fields or elements."""
    parts = children(config)
    if parts is None:
        yield path, config
        return
    for name, child in parts.items():
        yield from leaves(child, join(path, name))


def children(value: Any) -> dict[str, Any] | None:
    """The fields of a node or the elements of a tuple, by name; None for a plain value."""
    if isinstance(value, Node):
        return {name: getattr(value, name) for name in field_types(type(value))}
    return {str(i): item for i, item in enumerate(value)} if isinstance(value, tuple) else None


def diff(a: Any, b: Any, path: str = "") -> list[str]:
    """One line for every field that differs: `model.num_layers: 25 -> 12`. A node of another class is one line."""
    if a == b:
        return []
    old, new = children(a), children(b)
    if old is None or new is None or type(a) is not type(b):
        return [f"{path}: {as_text(a)} -> {as_text(b)}"]
    lines = []
    for name in {**old, **new}:
        if name in old and name in new:
            lines += diff(old[name], new[name], join(path, name))
        else:
            before, after = (as_text(side[name]) if name in side else "absent" for side in (old, new))
            lines.append(f"{join(path, name)}: {before} -> {after}")
    return lines


def as_text(value: Any) -> str:
    """As the command line spells it."""
    match value:
        case None | bool():
            return str(value).lower()
        case Node():
            return type(value).__name__
        case tuple():
            return f"({', '.join(map(as_text, value))})"
    return str(value)


def override(config: Config, assignments: Iterable[str]) -> Config:
    """`config` with each `dotted.path=value` applied; all are applied before the result is checked.

    Paths may spell `_` as `-`, elements are named by index (`model.pattern.2.mixer.window=512`), values are read as the
    field's type: `1_000` or `1e6` for an int, `true`, `none`, a JSON list for a tuple.
    """
    assignments = list(assignments)
    config = _with_named_task(config, assignments)
    data = _plain(config, lambda cls: cls)  # classes, not names: two mixers may share a name
    for assignment in assignments:
        dotted, equals, text = assignment.partition("=")
        if not equals or not dotted:
            raise ConfigError(assignment, ": expected field.path=value, such as train.steps=100")
        _assign(config, data, dotted.lstrip("-").replace("-", "_").split("."), text)
    return from_dict(Config, data)


def _with_named_task(config: Config, assignments: Iterable[str]) -> Config:
    """`config` with the task that the last assignment to `data.source` names, so that its fields can be set as well.

    Nothing is checked: the other assignments are still to come.
    """
    pairs = (assignment.partition("=") for assignment in assignments)
    named = [text for dotted, _, text in pairs if dotted.lstrip("-") == "data.source"]
    kind = TASKS.get(named[-1]) if named else None
    if not named or type(config.data.task) is kind:
        return config
    data, changed = copy.copy(config.data), copy.copy(config)
    object.__setattr__(data, "task", None if kind is None else kind())
    object.__setattr__(changed, "data", data)
    return changed


def _assign(config: Config, data: Any, parts: Sequence[str], text: str) -> None:
    value, hint, where = config, Any, ""
    for depth, part in enumerate(parts):
        known = children(value)
        if known is None:
            what = "none" if value is None else f"the value {as_text(value)}"
            raise ConfigError(".".join(parts), f": no such field, {where} is {what}")
        if part not in known:
            raise ConfigError(join(where, part), _no_such_child(config, value, known, parts[depth:]))
        hint = field_types(type(value))[part] if isinstance(value, Node) else _item_hint(hint)
        value, where = known[part], join(where, part)
        key: Any = int(part) if isinstance(data, list) else part
        if depth < len(parts) - 1:
            data = data[key]
        else:
            data[key] = _parse(text, hint, where, value)


def _no_such_child(config: Config, value: Any, known: dict[str, Any], parts: Sequence[str]) -> str:
    if isinstance(value, tuple):
        return f": no such element; there are {len(value)}, counted from 0"
    if close := suggestion(parts[0], known):
        return f": no such field{close}"
    wanted = "." + ".".join(parts)
    elsewhere = next((path for path, _ in leaves(config) if path.endswith(wanted)), None)
    return (
        f": no such field; did you mean {elsewhere}?" if elsewhere else f": no such field; known are {', '.join(known)}"
    )


def _parse(text: str, hint: Any, path: str, current: Any) -> Any:
    kinds = _alternatives(hint)
    if types.NoneType in kinds and text.lower() in ("none", "null"):
        return None
    if _node_class(hint) or (_item_hint(hint) and _node_class(_item_hint(hint))):
        example = next((p for p, _ in leaves(current, path) if p != path), None)
        fields = f"; set its fields ({example}=...) or" if example else ";"
        raise ConfigError(f"{path}={text}", f": a command line sets single values{fields} edit a recipe file")
    kind = next(k for k in kinds if k is not types.NoneType)
    try:
        return _parse_scalar(text, kind)
    except ValueError:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "a JSON list")
        optional = " or none" if types.NoneType in kinds else ""
        raise ConfigError(f"{path}={text}", f": expected {expected}{optional}") from None


def _parse_scalar(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        items = json.loads(text)  # its error is a ValueError
        if not isinstance(items, list):
            raise ValueError(text)
        return items
    if typing.get_origin(kind) is Literal:
        return next((choice for choice in typing.get_args(kind) if str(choice) == text), text)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind is int and re.search("[.eE]", text):
        if not float(text).is_integer():
            raise ValueError(text)
        return int(float(text))
    return kind(text)


def recipes_directory() -> Path:
    """configs/ inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def load_config(name_or_path: str | os.PathLike[str]) -> Config:
    """The Config of a recipe in configs/ by its name, or of any .py recipe or .json file by its path."""
    text = os.fspath(name_or_path)
    recipe = recipes_directory() / f"{text}.py"
    is_name = re.fullmatch(r"[\w-]+", text) is not None
    path = recipe if is_name and recipe.is_file() else Path(text)
    if path.is_dir():
        raise ConfigError(text, ": is a directory; give a recipe, or a run's config.json")
    if not path.is_file():
        missing = "no such recipe or file" if is_name else "no such file"
        folder = recipes_directory() if is_name else path.parent
        known = [p.stem if is_name else p.name for p in folder.glob("*.py")]
        raise ConfigError(text, f": {missing}{suggestion(path.name, known)} (hybridlm list configs)")
    if path.suffix == ".json":
        return load_json(path)
    if path.suffix != ".py":
        raise ConfigError(text, ": a recipe is a .py file that ends in config = Config(...), or a run's config.json")
    return _execute(path.resolve(), path.stat().st_mtime_ns)


def list_recipes() -> list[tuple[str, str, Config]]:
    """(name, first line of the docstring, config) of every recipe in configs/, by name."""
    found = []
    for path in sorted(recipes_directory().glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found.append((path.stem, docstring.partition("\n")[0], load_config(path)))
    return found


@functools.cache  # a mixer that a recipe defines stays one class, however often the recipe is loaded
def _execute(path: Path, _modified: int) -> Config:
    module = types.ModuleType(f"recipe:{path}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look up the annotations of a mixer defined in the recipe
    linecache.checkcache(str(path))
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except FileError:
        raise
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line_in(path, error)
        raise FileError(f"{_short(path)}:{line}", f": {_explain(error)}") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        what = "it sets none" if config is None else f"it is of type {type(config).__name__}"
        raise FileError(_short(path), f": a recipe must end in config = Config(...); {what}")
    return config


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _line_in(path: Path, error: Exception) -> int | str:
    line, frame = "?", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


def _explain(error: Exception) -> str:
    """The exception in a recipe, in the words of its author."""
    if isinstance(error, ConfigError):
        return str(error)
    text = str(error)
    if unknown := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text):
        name, word = unknown.groups()
        fields = next(
            (field_types(c) for c in _subclasses(Node) if c.__name__ == name and dataclasses.is_dataclass(c)), {}
        )
        return f"{name}.{word}: no such field{suggestion(word, fields)}"
    if missing := re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.*)", text):
        return f"{missing[1]}: {missing[2].replace(chr(39), '')} is required"
    if isinstance(error, SyntaxError):
        return f"syntax error: {error.msg}"
    if word := re.search(r"^(?:cannot import )?name '(\w+)'", text):
        return text + suggestion(word[1], vars(sys.modules["hybridlm.config"]))
    return f"{type(error).__name__}: {text}"
