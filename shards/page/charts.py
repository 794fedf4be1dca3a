"""Charts as inline SVG: each with its numbers in a table, for those who cannot or need not see it.

Sizes are in SVG units of a 480-wide drawing that scales with the page; colours come from the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from shards.page.html_page import Child, Html, details, join, table, tag

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
_MAX_TABLE_ROWS = 200
_LETTER = 10
"""Width of a letter of the labels, at most, as a phone draws them."""
NUM_COLOURS = 6
"""Series beyond these repeat a colour with another dash."""


class Bar(NamedTuple):
    """One row of a bar list."""

    label: Child
    value: float
    note: Child = None


class Line(NamedTuple):
    """One series of a line chart; a y that is NaN or None breaks the line."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


class Mark(NamedTuple):
    """A vertical line at x, with a label, such as where a run was resumed."""

    x: float
    label: str


def bar_list(caption: str, bars: Sequence[Bar], head: tuple[str, str, str] = ("", "count", "share")) -> Html:
    """A table whose rows show their value as a bar too. `note` takes the last column: a share by default."""
    total = sum(bar.value for bar in bars)
    largest = max((bar.value for bar in bars), default=0) or 1
    rows: list[Sequence[Child]] = []
    for bar in bars:
        share = f"{100 * bar.value / total:.1f} %" if total else None
        rows.append((bar.label, bar.value, _bar(bar.value / largest), share if bar.note is None else bar.note))
    return table((head[0], head[1], tag("span", "bar", class_="unseen"), head[2]), rows, caption, class_="bars")


def line_chart(
    caption: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    from_zero: bool = False,
    marks: Sequence[Mark] = (),
) -> Html:
    """Series over a common x axis, with a legend; the table has some 200 rows, evenly taken."""
    lines = [line for line in lines if any(_is_number(y) for y in line.y)]
    if not lines:
        return tag("figure", tag("figcaption", caption), tag("p", "Nothing was recorded.", class_="quiet"))
    all_y = [float(y) for line in lines for y in line.y if _is_number(y) and y is not None]
    all_x = [float(x) for line in lines for x in line.x]
    frame = _Frame((min(all_x), max(all_x)), (min([*all_y, *([0.0] if from_zero else [])]), max(all_y)))
    drawn = [_path(frame, line, place) for place, line in enumerate(lines)]
    signs = [
        join(
            (
                tag("line", x1=_short(frame.x(m.x)), x2=_short(frame.x(m.x)), y1=TOP, y2=frame.bottom, class_="mark"),
                _mark_label(frame, m),
            )
        )
        for m in marks
    ]
    most = max(20, _MAX_TABLE_ROWS // len(lines))
    rows = [(line.name, x, y) for line in lines for x, y in _thinned(line, most)]
    svg = frame.svg(caption, [*signs, *drawn], x_label, y_label, pointed=True)
    return _figure(caption, svg, table(("series", x_label, y_label), rows, caption), _legend(lines))


def _mark_label(frame: _Frame, mark: Mark) -> Html:
    """Right of its line, left of it where the drawing ends."""
    x = frame.x(mark.x)
    if x > WIDTH - RIGHT - _LETTER * len(mark.label):
        return tag("text", mark.label, x=_short(x - 3), y=TOP + 10, text_anchor="end")
    return tag("text", mark.label, x=_short(x + 3), y=TOP + 10)


def spark(values: Sequence[float | None], label: str) -> Html:
    """A small line without axes; `label` says what it shows."""
    width, height = 120, 24
    known = [value for value in values if _is_number(value) and value is not None]
    if not known:
        return Html("")
    low, high = min(known), max(known)
    step = width / max(1, len(values) - 1)
    scale = (height - 2) / ((high - low) or 1)
    points = " ".join(
        f"{_short(place * step)},{_short(height - 1 - (value - low) * scale)}"
        for place, value in enumerate(values)
        if _is_number(value) and value is not None
    )
    line = tag("polyline", points=points, class_="line0")
    return tag("svg", line, viewBox=f"0 0 {width} {height}", class_="spark", role="img", aria_label=label)


class _Frame:
    """Axes over two ranges."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._x, self.x_ticks = _range(*x, loose=False)
        self._y, self.y_ticks = _range(*y, loose=True)
        self.bottom = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - TOP)

    def svg(
        self, caption: str, drawn: Sequence[Html], x_label: str, y_label: str = "", *, pointed: bool = False
    ) -> Html:
        """The drawing; `pointed`: `page.js` shows the values under the pointer, by the scale that is given to it."""
        grid = [
            join(
                (
                    tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_short(self.y(t)), y2=_short(self.y(t)), class_="grid"),
                    tag("text", _tick(t, self.y_ticks), x=LEFT - 6, y=_short(self.y(t) + 4), text_anchor="end"),
                )
            )
            for t in self.y_ticks
        ]
        feet = [self._foot(t) for t in self.x_ticks]
        labels = [
            tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 6, text_anchor="middle", class_="axis"),
            tag("text", y_label, x=4, y=-6, class_="axis") if y_label else None,
        ]
        view = f"0 {-20 if y_label else 0} {WIDTH} {HEIGHT + (20 if y_label else 0)}"
        scale = " ".join(map(str, (LEFT, WIDTH - RIGHT, *self._x, TOP, self.bottom))) if pointed else None
        return tag(
            "svg", *grid, *feet, *labels, *drawn, viewBox=view, role="img", aria_label=caption, class_="chart",
            data_scale=scale,
        )  # fmt: skip

    def _foot(self, tick: float) -> Html:
        """A label under the axis, within the drawing."""
        words, x = _tick(tick, self.x_ticks), self.x(tick)
        half = _LETTER * len(words) / 2
        if x + half > WIDTH:
            return tag("text", words, x=WIDTH, y=self.bottom + 16, text_anchor="end")
        return tag("text", words, x=_short(x), y=self.bottom + 16, text_anchor="middle")


def _figure(caption: str, svg: Html, numbers: Html, legend: Html | None = None) -> Html:
    return tag("figure", tag("figcaption", caption), svg, legend, details("The numbers", numbers))


def _legend(lines: Sequence[Line]) -> Html | None:
    if len(lines) < 2:
        return None
    items = [
        tag("li", tag("svg", tag("line", x1=0, x2=24, y1=5, y2=5, class_=_stroke(place)), viewBox="0 0 24 10",
                      aria_hidden="true"), line.name)
        for place, line in enumerate(lines)
    ]  # fmt: skip
    return tag("ul", *items, class_="legend")


def _path(frame: _Frame, line: Line, place: int) -> Html:
    runs: list[list[str]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if _is_number(y) and y is not None:
            runs[-1].append(f"{_short(frame.x(x))} {_short(frame.y(y))}")
        elif runs[-1]:
            runs.append([])
    words = " ".join("M" + "L".join(run) for run in runs if len(run) > 1)
    # A point alone has no line.
    dots = [run[0].split() for run in runs if len(run) == 1]
    circles = [tag("circle", cx=x, cy=y, r=3, class_=f"fill{place % NUM_COLOURS}") for x, y in dots]
    path = tag("path", d=words, class_=_stroke(place)) if words else None
    return tag("g", tag("title", line.name), path, *circles)


def _stroke(place: int) -> str:
    dash = f" dash{place // NUM_COLOURS % 3}" if place >= NUM_COLOURS else ""
    return f"line{place % NUM_COLOURS}{dash}"


def _bar(share: float) -> Html:
    rect = tag("rect", width=_short(100 * max(0.0, share)), height=10, class_="fill0")
    return tag("svg", rect, viewBox="0 0 100 10", preserveAspectRatio="none", class_="bar", aria_hidden="true")


def _thinned(line: Line, most: int) -> list[tuple[float, float | None]]:
    step = max(1, math.ceil(len(line.x) / most))
    pairs = list(zip(line.x, line.y, strict=True))
    return pairs[::step] + (pairs[-1:] if (len(pairs) - 1) % step else [])


def _range(low: float, high: float, *, loose: bool) -> tuple[tuple[float, float], list[float]]:
    """The range of an axis and its ticks, at 1, 2 or 5 times a power of ten; `loose` widens it to whole ticks."""
    if high <= low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(place * step, 12) for place in range(first, last + 1)]
    if loose:
        return (ticks[0], ticks[-1]), ticks
    return (low, high), [tick for tick in ticks if low - step * 1e-9 <= tick <= high + step * 1e-9]


def _tick(value: float, ticks: Sequence[float]) -> str:
    largest = max(abs(tick) for tick in ticks)
    if largest >= 100_000:
        return f"{value:.3g}"
    if 0 < largest < 0.001:  # 0.00015 is wider than the margin
        return f"{value:.1e}".replace("e-0", "e-") if value else "0"
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
