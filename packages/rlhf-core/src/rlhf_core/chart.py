"""Line charts as SVG inside a page: drawn by arithmetic, styled by the page, readable without colours and without sight."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rlhf_core.html import Html, tag

Points = Sequence[tuple[float, float]]
"""Places on x and y; y may be infinite or not a number, which leaves a gap."""

WIDTH, HEIGHT = 540, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 46
"""Room around the plot, in the units of the drawing."""

KINDS = 4
"""Ways in which lines look different."""

MOST_POINTS = 240
"""More are drawn as means of neighbours."""

MOST_DOTS = 40
"""Lines of more points have no dots."""


@dataclass(frozen=True)
class Axis:
    """A range of values laid on a range of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value is in the drawing, to a tenth of a unit."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def covers(self, value: float) -> bool:
        """Whether a value is on the axis, but for rounding."""
        slack = 1e-9 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack


def line_chart(title: str, lines: Mapping[str, Points], x_label: str, y_label: str) -> Html:
    """A chart of lines, with a legend if there are several, as an element `figure`.

    A point says its values when the mouse is on it; a line's first and last values are in the description that screen
    readers tell. A line of more than `MOST_POINTS` points is drawn through means of as many neighbours as it takes, and
    the caption says so.

    Args:
        title: what the chart shows.
        lines: points by the name of their line, at most four lines; at least one point must be finite.
        x_label: name of the x axis.
        y_label: name of the y axis, with its unit.

    Raises:
        ValueError: there is nothing to draw, or more lines than can be told apart.
    """
    drawn = {name: thinned(points) for name, points in lines.items()}
    finite = [(x, y) for points in drawn.values() for x, y in points if math.isfinite(y)]
    if not finite or len(drawn) > KINDS:
        raise ValueError(f"{title}: a chart shows 1 to {KINDS} lines and needs a point, got {len(drawn)} lines")
    x_axis = Axis(*widened(min(x for x, _ in finite), max(x for x, _ in finite)), LEFT, WIDTH - RIGHT)
    y_ticks = ticks(*widened(min(y for _, y in finite), max(y for _, y in finite)))
    y_axis = Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    shapes = [
        shape
        for number, (name, points) in enumerate(drawn.items())
        for shape in line(number, name if len(drawn) > 1 else y_label, points, x_axis, y_axis, x_label)
    ]
    picture = tag(
        "svg",
        tag("title", title),
        tag("desc", " ".join(described(name, points, x_label) for name, points in lines.items())),
        *grid(x_axis, y_axis, y_ticks),
        tag("text", x_label, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, text_anchor="middle"),
        tag(
            "text", y_label, transform=f"translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)", text_anchor="middle"
        ),
        *shapes,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )
    return tag("figure", tag("figcaption", tag("b", title), *legend(list(drawn)), note(lines)), picture)


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: means of equally many neighbours each (the last may be of fewer)."""
    size = neighbours(points)
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(mean([x for x, _ in group]), mean([y for _, y in group])) for group in groups]


def neighbours(points: Points) -> int:
    """How many points are drawn as one."""
    return max(1, math.ceil(len(points) / MOST_POINTS))


def mean(values: Sequence[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, or one around it if it has no width."""
    around = abs(low) * 0.1 or 1.0
    return (low, high) if high > low else (low - around, low + around)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances, at most `most` steps, the first not above `low` and the last not below `high`."""
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def figure(value: float) -> str:
    """A number as it is written out, with about four digits."""
    if not math.isfinite(value) or (value and not 1e-3 <= abs(value) < 1e7):
        return short_exponent(f"{value:.4g}")
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def tick_label(tick: float, step: float) -> str:
    """A tick as exactly as the distance of ticks asks for."""
    if step < 1e-3 or step >= 1e6:
        return short_exponent(f"{tick:.4g}")
    return f"{tick:z,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def short_exponent(text: str) -> str:
    """`5e-6` for `5e-06`."""
    return re.sub(r"e([+-])0*", lambda found: f"e{found[1].strip('+')}", text)


def grid(x_axis: Axis, y_axis: Axis, y_ticks: list[float]) -> Iterator[Html]:
    """Lines across the plot at the ticks of y, and the numbers of both axes."""
    for tick in y_ticks:
        y = y_axis.place(tick)
        yield tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
        yield tag("text", tick_label(tick, y_ticks[1] - y_ticks[0]), x=LEFT - 8, y=y + 4, text_anchor="end")
    x_ticks = ticks(x_axis.low, x_axis.high)
    for tick in x_ticks:
        if x_axis.covers(tick):
            label = tick_label(tick, x_ticks[1] - x_ticks[0])
            yield tag("text", label, x=x_axis.place(tick), y=HEIGHT - BOTTOM + 18, text_anchor="middle")


def line(number: int, name: str, points: Points, x_axis: Axis, y_axis: Axis, x_label: str) -> Iterator[Html]:
    """One line: its strokes, broken where a value is not finite, its dots, and the spots that tell values."""
    for stroke in strokes(points):
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in stroke]
        if len(places) > 1:
            yield tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_=f"line line-{number}")
        if len(points) <= MOST_DOTS or len(places) == 1:
            yield from (tag("circle", cx=x, cy=y, r=3, class_=f"dot dot-{number}") for x, y in places)
        for (x, y), (at, value) in zip(places, stroke, strict=True):
            told = tag("title", f"{x_label} {figure(at)}: {name} {figure(value)}")
            yield tag("circle", told, cx=x, cy=y, r=6, class_=f"spot spot-{number}")


def strokes(points: Points) -> list[list[tuple[float, float]]]:
    """Runs of finite points."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def legend(names: list[str]) -> Iterator[Html | str]:
    """A piece of each line with its name, if there are several."""
    for number, name in enumerate(names if len(names) > 1 else []):
        stroke = tag("line", x1=0, x2=24, y1=5, y2=5, class_=f"line line-{number}")
        yield tag("svg", stroke, viewBox="0 0 24 10", aria_hidden="true")
        yield name


def note(lines: Mapping[str, Points]) -> str:
    """Says so where points are means."""
    most = max(map(neighbours, lines.values()))
    return f" (points are means of up to {most})" if most > 1 else ""


def described(name: str, points: Points, x_label: str) -> str:
    """What is told of a line to who cannot see it."""
    (first, was), (last, now) = points[0], points[-1]
    return f"{name}: {figure(was)} at {x_label} {figure(first)}, {figure(now)} at {x_label} {figure(last)}."
