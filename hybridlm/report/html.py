"""HTML as text in which everything that is not markup is escaped."""

import html
import re
from collections.abc import Iterable, Sequence

VOID = frozenset({"meta", "line", "polyline", "circle", "rect", "br"})
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Markup(str):
    """Text that is HTML already."""


def escaped(text: str) -> Markup:
    """Any text, also of models: control characters are shown as pictures, lone surrogates as question marks."""
    shown = CONTROL.sub(lambda found: _picture(found[0]), text.replace("\r\n", "\n"))
    return Markup(html.escape(shown.encode("utf-8", "replace").decode("utf-8")))


def _picture(control: str) -> str:
    """A character of Unicode's Control Pictures, or the replacement character."""
    code = ord(control)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def element(tag: str, /, *children: str, **attributes: str | float | bool | None) -> Markup:
    """`<name ...>children</name>`; children that are no Markup are escaped.

    Attributes that are None or False are left out; `class_` is `class`, and other underscores are hyphens.
    """
    words = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escaped(str(value))}"')
    opened = " ".join(words)
    if tag in VOID and not children:
        return Markup(f"<{opened}/>")
    return Markup(f"<{opened}>{joined(children)}</{tag}>")


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """One after the other."""
    return Markup(between.join(part if isinstance(part, Markup) else escaped(part) for part in parts))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1, caption: str = "") -> Markup:
    """A table that scrolls in itself; the first `text_columns` to the left, the others to the right as numbers."""

    def cells(name: str, row: Sequence[str]) -> Markup:
        made = []
        for n, cell in enumerate(row):
            is_name = name == "td" and n == 0
            made.append(
                element(
                    "th" if is_name else name,
                    cell,
                    scope="row" if is_name else "col" if name == "th" else None,
                    class_="number" if n >= text_columns else None,
                )
            )
        return element("tr", *made)

    body = element("tbody", *(cells("td", row) for row in rows))
    inner = [element("caption", caption)] if caption else []
    whole = element("table", *inner, element("thead", cells("th", head)), body)
    return element("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption or head[0] or "table")


def folded(summary: str, *children: str) -> Markup:
    """Hidden until asked for."""
    return element("details", element("summary", summary), *children)


def section(title: str, anchor: str, *children: str, lead: str = "") -> Markup:
    """A part of the page; nothing where it has no content."""
    if not any(children):
        return Markup()
    heading = element("h2", title)
    inner = (heading, element("p", lead, class_="lead")) if lead else (heading,)
    return element("section", *inner, *children, id=anchor)
