"""HTML as a tree, and an error where it is not well formed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    children: list["Element | str"] = field(default_factory=list)

    def all(self, name: str, class_: str | None = None) -> Iterator["Element"]:
        """Those below with this name and class, in order."""
        for child in self.children:
            if isinstance(child, Element):
                if child.name == name and (class_ is None or class_ in child.attributes.get("class", "").split()):
                    yield child
                yield from child.all(name, class_)

    def one(self, name: str, class_: str | None = None) -> "Element":
        return next(self.all(name, class_))

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def rows(self) -> list[list[str]]:
        """The texts of a table's cells."""
        cells = ([c for c in row.children if isinstance(c, Element)] for row in self.all("tr"))
        return [[cell.text for cell in row] for row in cells]


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("document", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        made = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].name == tag, f"</{tag}> closes <{self.open[-1].name}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """The document. Asserts that every element is closed where it should be."""
    tree = _Tree()
    tree.feed(text)
    tree.close()
    assert [element.name for element in tree.open] == ["document"], "not all elements are closed"
    return tree.open[0]


def chart_of(document: Element, title: str, n: int = 0) -> Element:
    """The n-th figure of this title."""
    found = [figure for figure in document.all("figure", "chart") if figure.one("span", "title").text == title]
    return found[n]


def line_of(figure: Element, name: str) -> Element:
    """The group of a line within a chart."""
    return next(group for group in figure.all("g") if group.attributes.get("data-name") == name)


def points_of(group: Element, kind: str = "line") -> list[tuple[float, float]]:
    """Pixels of a line, in order."""
    texts = [line.attributes["points"].split() for line in group.all("polyline", kind)]
    return [(float(x), float(y)) for text in texts for x, y in (point.split(",") for point in text)]


def ticks_of(figure: Element) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(value, pixel) of the labels along x and along y, as a reader of the picture sees them."""
    along_x, along_y = [], []
    for label in figure.one("g", "grid").all("text"):
        text = label.text.replace(",", "")
        value = float(text[:-1]) * {"k": 1e3, "M": 1e6}[text[-1]] if text[-1] in "kM" else float(text)
        if label.attributes["text-anchor"] == "middle":
            along_x.append((value, float(label.attributes["x"])))
        else:
            along_y.append((value, float(label.attributes["y"]) - 4))  # the label's baseline lies below its line
    return along_x, along_y
