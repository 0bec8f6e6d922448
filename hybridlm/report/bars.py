"""Shares of a whole as one bar, and a table of them."""

from collections.abc import Mapping, Sequence

from hybridlm.report.charts import NUM_COLOURS
from hybridlm.report.html import Markup, element, table
from hybridlm.report.numbers import percent

SMALLEST_SHARE = 0.0005


def shares(title: str, parts: Mapping[str, float], texts: Mapping[str, str], head: Sequence[str]) -> Markup:
    """Of `parts`, which are amounts by name, a bar and beneath it a table of `head`: name, text and share.

    Parts below half a thousandth are left out.
    """
    total = sum(parts.values())
    shown = {name: amount for name, amount in parts.items() if total and amount / total >= SMALLEST_SHARE}
    if not shown:
        return Markup()
    told = ", ".join(f"{name} {percent(amount / total)}" for name, amount in shown.items())
    pieces, rows, at = [], [], 0.0
    for n, (name, amount) in enumerate(shown.items()):
        wide, colour = 1000 * amount / total, f"s{n % NUM_COLOURS}" + (" again" if n >= NUM_COLOURS else "")
        pieces.append(element("rect", x=f"{at:.2f}", y=0, width=f"{max(wide - 2, 0.5):.2f}", height=20, class_=colour))
        at += wide
        label = element("span", element("i", class_=f"swatch {colour}"), name)
        rows.append([label, texts[name], percent(amount / total)])
    svg = element(
        "svg",
        element("title", title),
        element("desc", told),
        *pieces,
        viewBox="0 0 1000 20",
        preserveAspectRatio="none",
        role="img",
        class_="bar",
    )
    caption = element("figcaption", element("div", element("span", title, class_="title")))
    return element("figure", caption, svg, table(head, rows), class_="shares")
