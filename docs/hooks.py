"""Writes the references of the command line and of the config from their source when the site is built."""

import argparse
import ast
import inspect
from collections.abc import Iterator
from typing import Any

from hybridlm import config
from hybridlm.cli import make_parser
from hybridlm.config_check import Node


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    for mark, write in {"<!-- commands -->": commands, "<!-- fields -->": fields}.items():
        if mark in markdown:
            markdown = markdown.replace(mark, write())
    return markdown


def commands() -> str:
    """A section per subcommand."""
    groups = make_parser()._subparsers
    assert groups is not None
    subparsers = groups._group_actions[0].choices
    assert isinstance(subparsers, dict)
    return "\n\n".join(command(parser) for parser in subparsers.values())


def command(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [f"| `{spelling(action)}` | {explanation(action)} |" for action in actions]
    table = "\n".join(["| Argument | |", "|---|---|", *rows])
    description = parser.description or ""
    parts = [f"## {parser.prog}", f"{description[:1].upper()}{description[1:]}.", table, parser.epilog or ""]
    return "\n\n".join(part for part in parts if part)


def spelling(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"[{action.dest}]" if action.nargs == "?" else action.dest
    name = ", ".join(action.option_strings)
    return name if action.nargs == 0 else f"{name} {action.metavar or action.dest.upper()}"


def explanation(action: argparse.Action) -> str:
    parts = [(action.help or "").replace("[", "\\[")]  # not a link
    if action.choices is not None:
        parts.append("one of " + ", ".join(f"`{choice}`" for choice in action.choices))
    if action.default or (action.default == 0 and action.nargs != 0):
        parts.append(f"default `{action.default}`")
    return cell("; ".join(part for part in parts if part))


def fields() -> str:
    """A section per config class, in the order of the sources; the whole first, then what is defined beside it."""
    nodes = [cls for cls in vars(config).values() if isinstance(cls, type) and issubclass(cls, Node)]
    modules = dict.fromkeys([config, *(inspect.getmodule(cls) for cls in nodes if cls is not Node)])
    trees = [ast.parse(inspect.getsource(module)) for module in modules if module is not None]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    classes.sort(key=lambda node: node.name != config.Config.__name__)
    return "\n\n".join(config_class(node) for node in classes)


def config_class(node: ast.ClassDef) -> str:
    bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "Node"]
    docstring = " ".join((ast.get_docstring(node) or "").split())
    rows = [f"| `{name}` | `{cell(kind)}` | {default} | {cell(text)} |" for name, kind, default, text in rows_of(node)]
    table = "\n".join(["| Field | Type | Default | |", "|---|---|---|---|", *rows]) if rows else ""
    kind = f"*{'A kind of ' + ', '.join(bases)}.* " if bases else ""
    return "\n\n".join(part for part in (f"## {node.name}", f"{kind}{docstring}", table) if part)


def rows_of(node: ast.ClassDef) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and the string below every field."""
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign):
            default = "required" if statement.value is None else f"`{ast.unparse(statement.value)}`"
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            yield ast.unparse(statement.target), ast.unparse(statement.annotation).strip("'"), default, text


def cell(text: str) -> str:
    """`text` where `|` would end a table's cell."""
    return text.replace("|", "\\|")
