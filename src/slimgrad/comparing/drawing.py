"""The picture of one model: time against peak, slimgrad's points joined, every peer a numbered mark."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from slimgrad.comparing.rows import Row
from slimgrad.measuring.svg import element, picture

_LEFT, _TOP, _BOTTOM, _LEGEND = 62.0, 34.0, 52.0, 300.0
_SLIM, _APPROXIMATE, _PEER, _COMPILED = "#0072b2", "#56b4e9", "#d55e00", "#009e73"


def frontier_points(rows: Sequence[Row]) -> list[Row]:
    """slimgrad's measured rows for budgets that were asked for, by peak: the points that a line joins."""
    return _by_peak(r for r in rows if r.kind == "slimgrad" and "@" not in r.contender)


def approximate_points(rows: Sequence[Row]) -> list[Row]:
    """slimgrad's measured rows of the rung ``approximate``, by peak."""
    return _by_peak(r for r in rows if r.kind == "approximate")


def _by_peak(rows: Iterable[Row]) -> list[Row]:
    measured = [r for r in rows if r.is_measured]
    return sorted(measured, key=lambda r: (r.peak_ratio or 0.0, r.time_ratio or 0.0))


def planned_for_peers(rows: Sequence[Row]) -> list[Row]:
    """slimgrad's measured rows at peers' peaks."""
    return [r for r in rows if r.kind == "slimgrad" and "@" in r.contender and r.is_measured]


def other_points(rows: Sequence[Row]) -> list[Row]:
    """Plain training and the peers that were measured."""
    return [r for r in rows if r.kind in ("plain", "peer") and r.is_measured]


@dataclass(frozen=True)
class _Axes:
    """From ratios to pixels."""

    width: float
    height: float
    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def x(self, value: float) -> float:
        return _LEFT + self.width * (value - self.low_x) / (self.high_x - self.low_x)

    def y(self, value: float) -> float:
        return _TOP + self.height * (self.high_y - value) / (self.high_y - self.low_y)

    def at(self, row: Row) -> tuple[float, float]:
        """Where the row's point lies."""
        return self.x(row.peak_ratio or 0.0), self.y(row.time_ratio or 0.0)


def frontier_svg(model: str, rows: Sequence[Row], width: float = 1060, height: float = 420) -> str:
    """Peak ratio to the right, time ratio up; the lower left is better. Empty axes where nothing was measured."""
    exact, approximate = frontier_points(rows), approximate_points(rows)
    points = [*exact, *approximate, *planned_for_peers(rows), *other_points(rows)]
    peaks = [r.peak_ratio or 1.0 for r in points] or [1.0]
    times = [r.time_ratio or 1.0 for r in points] or [1.0]
    axes = _Axes(
        width - _LEFT - _LEGEND,
        height - _TOP - _BOTTOM,
        math.floor(10 * min(0.9, *peaks)) / 10 - 0.02,
        max(1.02, *peaks) + 0.03,
        math.floor(10 * min(0.9, *times)) / 10,
        max(1.1, *times) + 0.05,
    )
    return picture(
        width,
        height,
        element("rect", width=width, height=height, class_="paper"),
        element("text", model, x=_LEFT, y=20, class_="strong"),
        _grid(axes),
        _line(axes, approximate, _APPROXIMATE),
        _line(axes, exact, _SLIM),
        *[_dot(axes, row, 3, _SLIM) for row in planned_for_peers(rows)],
        *[_dot(axes, row, 4, _APPROXIMATE) for row in approximate],
        *[_dot(axes, row, 5, _SLIM) for row in exact],
        *[_mark(axes, i, row) for i, row in enumerate(other_points(rows))],
        _legend(other_points(rows), width - _LEGEND + 24, bool(approximate)),
        prefix=f"frontier-{model}",
        label=f"{model}: time of a step against its peak, both as ratios to plain training",
    )


def _grid(axes: _Axes) -> Markup:
    lines: list[Markup] = []
    bottom, right = _TOP + axes.height, _LEFT + axes.width
    for value in _ticks(axes.low_x, axes.high_x):
        x = axes.x(value)
        lines.append(element("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid"))
        lines.append(
            element(
                "text", f"{value:.1f}", x=x, y=bottom + 16, text_anchor="middle", class_="small"
            )
        )
    for value in _ticks(axes.low_y, axes.high_y):
        y = axes.y(value)
        lines.append(element("line", x1=_LEFT, x2=right, y1=y, y2=y, class_="grid"))
        lines.append(
            element("text", f"{value:.1f}", x=_LEFT - 8, y=y + 4, text_anchor="end", class_="small")
        )
    middle = _LEFT + axes.width / 2
    return element(
        "g",
        *lines,
        element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"),
        element("line", x1=_LEFT, x2=_LEFT, y1=_TOP, y2=bottom, class_="axis"),
        element("text", "peak / plain", x=middle, y=bottom + 36, text_anchor="middle"),
        element(
            "text",
            "time / plain",
            x=16,
            y=_TOP + axes.height / 2,
            text_anchor="middle",
            transform=f"rotate(-90 16 {_TOP + axes.height / 2:.0f})",
        ),
    )


def _ticks(low: float, high: float) -> list[float]:
    step = next(s for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1e9) if (high - low) / s <= 12)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step) + 1)]


def _line(axes: _Axes, rows: Sequence[Row], colour: str) -> Markup:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(axes.at, rows))
    return element("polyline", points=points, fill="none", stroke=colour, stroke_width=2)


def _told(row: Row) -> Markup:
    text = f"{row.contender}: peak {row.peak_ratio:.2f}, time {row.time_ratio:.2f} of plain"
    return element("title", text)


def _dot(axes: _Axes, row: Row, radius: float, colour: str) -> Markup:
    x, y = axes.at(row)
    return element("circle", _told(row), cx=x, cy=y, r=radius, fill=colour, class_="slim")


def _mark(axes: _Axes, number: int, row: Row) -> Markup:
    return element("g", _told(row), *_numbered(*axes.at(row), number, row), class_="peer")


def _numbered(x: float, y: float, number: int, row: Row) -> list[Markup]:
    colour = _COMPILED if row.compiled else _PEER
    shape = (
        element("rect", x=x - 8, y=y - 8, width=16, height=16, fill=colour)
        if row.compiled
        else element("circle", cx=x, cy=y, r=8.5, fill=colour)
    )
    text = element(
        "text", str(number), x=x, y=y + 4, text_anchor="middle", style="fill:#fff;font-size:11px"
    )
    return [shape, text]


def _legend(rows: Sequence[Row], x: float, has_approximate: bool) -> Markup:
    names = {"slimgrad (small: at a peer's peak)": _SLIM}
    if has_approximate:
        names["slimgrad, approximate"] = _APPROXIMATE
    lines: list[Markup] = []
    for i, (name, colour) in enumerate(names.items()):
        y = _TOP + 6 + 22 * i
        lines.append(element("circle", cx=x, cy=y, r=5, fill=colour))
        lines.append(element("text", name, x=x + 16, y=y + 4))
    for i, row in enumerate(rows):
        y = _TOP + 10 + 22 * (len(names) + i)
        lines += _numbered(x, y, i, row)
        lines.append(element("text", row.contender, x=x + 16, y=y + 4))
    return element("g", *lines, class_="legend")
