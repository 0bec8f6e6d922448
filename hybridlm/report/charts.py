"""Line charts as SVG, drawn here: they need no script. Beneath each lies the same as a table."""

import math
from collections.abc import Sequence

import numpy as np

from hybridlm.report.html import Markup, element, folded, joined, table
from hybridlm.report.numbers import number
from hybridlm.report.scales import Scale, axis_of
from hybridlm.report.series import Series, running_mean, segments, spread, thinned

WIDTH, HEIGHT = 480, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 468, 10, 206
"""Edges of the plot. Right of it is half a label's room, below it the labels of x."""
NUM_COLOURS = 6
SMOOTH_FROM = 80
"""Lines of so many values and more are drawn thin, and their mean over a fortieth of them on top."""
TABLE_ROWS = 24


def chart(
    title: str,
    lines: Sequence[Series | None],
    *,
    note: str = "",
    x_name: str = "step",
    is_log: bool | None = None,
    x_log: bool = False,
    from_zero: bool = False,
    smooth: bool = False,
    marks: Sequence[float] = (),
) -> Markup:
    """A figure of `lines` on one pair of axes; nothing where no line has values.

    `is_log` None is decided by the values. `marks` are places on x to be marked by a vertical line.
    """
    coloured = [(n % NUM_COLOURS, line) for n, line in enumerate(lines) if line is not None and len(line.x)]
    if not coloured:
        return Markup()
    x = axis_of(np.concatenate([line.x for _, line in coloured]), LEFT, RIGHT, is_log=x_log, from_zero=not x_log)
    y = axis_of(np.concatenate([line.y for _, line in coloured]), BOTTOM, TOP, is_log=is_log, from_zero=from_zero)
    drawn = [_line(line, colour, x, y, smooth) for colour, line in coloured]
    told = f"{title} over {x_name}. " + " ".join(_in_words(line, x_name) for _, line in coloured)
    svg = element(
        "svg",
        element("title", title),
        element("desc", told),
        _grid(x, y, x_name),
        *(element("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP, y2=BOTTOM, class_="mark") for at in _marks(x, marks)),
        *drawn,
        element("line", x1=LEFT, x2=LEFT, y1=TOP, y2=BOTTOM, class_="cursor"),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        data_x=_described(x),
        data_y=_described(y),
    )
    heading = element("div", element("span", title, class_="title"), element("span", f"by {x_name}", class_="at"))
    caption = element("figcaption", heading, *([element("p", note)] if note else []), _legend(coloured))
    return element("figure", caption, svg, folded("as a table", _table(coloured, x_name)), class_="chart")


def _line(line: Series, colour: int, x: Scale, y: Scale, smooth: bool) -> Markup:
    smoothed = smooth and not line.dots and len(line.x) >= SMOOTH_FROM
    parts = [_polylines(line.x, line.y, x, y, "raw" if smoothed else "line")]
    if smoothed:
        parts.append(_polylines(line.x, running_mean(line.y, len(line.x) // 40), x, y, "mean"))
    if line.dots:
        xs, ys = thinned(line.x, line.y, int(RIGHT - LEFT) // 8)
        parts += [
            element("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=2.6)
            for px, py in zip(x(xs), y(ys), strict=True)
            if math.isfinite(py)
        ]
    return element("g", *parts, class_=f"c{colour}", data_name=line.name)


def _polylines(xs: np.ndarray, ys: np.ndarray, x: Scale, y: Scale, kind: str) -> Markup:
    """One for each stretch without a gap; a value between two gaps is a dot."""
    if y.is_log:
        ys = np.where(ys > 0, ys, np.nan)
    xs, ys = thinned(xs, ys, int(RIGHT - LEFT))
    drawn = []
    for part in segments(ys):
        points = [f"{px:.1f},{py:.1f}" for px, py in zip(x(xs[part]), y(ys[part]), strict=True)]
        if len(points) > 1:
            drawn.append(element("polyline", points=" ".join(points), class_=kind))
        else:
            cx, _, cy = points[0].partition(",")
            drawn.append(element("circle", cx=cx, cy=cy, r=2, class_=f"single {kind}"))
    return joined(drawn)


def _grid(x: Scale, y: Scale, x_name: str) -> Markup:
    parts = []
    for value, label in y.ticks(5):
        at = float(y(np.array(value)))
        parts.append(element("line", x1=LEFT, x2=RIGHT, y1=f"{at:.1f}", y2=f"{at:.1f}"))
        parts.append(element("text", label, x=LEFT - 8, y=f"{at + 4:.1f}", text_anchor="end"))
    for value, label in x.ticks(5):
        at = float(x(np.array(value)))
        parts.append(element("line", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=BOTTOM, y2=BOTTOM + 4, class_="tick"))
        parts.append(element("text", label, x=f"{at:.1f}", y=BOTTOM + 19, text_anchor="middle"))
    return element("g", *parts, class_="grid", aria_hidden="true")


def _marks(x: Scale, marks: Sequence[float]) -> list[float]:
    return [float(x(np.array(at))) for at in sorted(set(marks)) if x.low < at < x.high]


def _legend(coloured: Sequence[tuple[int, Series]]) -> Markup:
    """Each line's name, where there are several, and its last value; the script shows others in its place."""
    items = []
    for colour, line in coloured:
        value = element("span", number(line.last), class_="value")
        name = [element("span", line.name, class_="name")] if len(coloured) > 1 else []
        items.append(element("span", element("i", class_=f"key c{colour}"), *name, value, class_="item"))
    return element("div", *items, class_="legend")


def _in_words(line: Series, x_name: str) -> str:
    finite = np.isfinite(line.y)
    values = line.y[finite]
    missing = len(line.y) - len(values)
    text = (
        f"{line.name}: {number(float(values[0]))} at first and {number(float(values[-1]))} at last, "
        f"lowest {number(float(values.min()))}, highest {number(float(values.max()))}."
    )
    return text + (f" Not finite or missing at {missing:,} of {len(line.y):,} records." if missing else "")


def _described(scale: Scale) -> str:
    """For the script: kind, values and pixels of the ends."""
    kind = "log" if scale.is_log else "linear"
    return f"{kind} {scale.low:.9g} {scale.high:.9g} {scale.start:g} {scale.end:g}"


def _table(coloured: Sequence[tuple[int, Series]], x_name: str) -> Markup:
    """Evenly spread places of x, and all of lines with few values."""
    every = np.unique(np.concatenate([line.x for _, line in coloured]))
    shown = set(every[spread(len(every), TABLE_ROWS)])
    for _, line in coloured:
        if len(line.x) <= TABLE_ROWS:
            shown |= set(line.x)
    columns = [dict(zip(line.x.tolist(), line.y.tolist(), strict=True)) for _, line in coloured]
    rows = [[_x_text(at), *(number(column.get(at)) for column in columns)] for at in sorted(shown)]
    caption = "" if len(shown) == len(every) else f"{len(shown):,} of {len(every):,} places"
    return table([x_name, *(line.name for _, line in coloured)], rows, caption=caption)


def _x_text(at: float) -> str:
    return f"{at:,.0f}" if at == round(at) else number(at)
