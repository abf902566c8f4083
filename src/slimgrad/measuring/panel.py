"""One panel of the picture: where it lies, and what is written on it (budget, peak, names of instants)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from slimgrad.measuring.svg import element, text_width
from slimgrad.types import format_bytes

_MARK_ROWS = 3


@dataclass(frozen=True)
class Panel:
    """Where one timeline is drawn: pixels of its plot area and bytes at its upper edge."""

    x: float
    width: float
    top: float
    bottom: float
    scale_bytes: float

    def x_of(self, share: float) -> float:
        """Pixels from the left for an instant, given as a share of the step; kept inside the panel."""
        return self.x + self.width * min(max(share, 0.0), 1.0)

    def y(self, num_bytes: float) -> float:
        """Pixels from the top for a height in bytes."""
        return self.bottom - (self.bottom - self.top) * num_bytes / self.scale_bytes


def budget_line(panel: Panel, budget_bytes: int | None, *, peak_share: float) -> Markup:
    """A dashed line, named at the end that is further from the peak's own figure."""
    if budget_bytes is None:
        return Markup("")
    y, end = panel.y(budget_bytes), panel.x + panel.width
    peak_is_left = peak_share < 0.5
    return element(
        "g",
        element("line", x1=panel.x, x2=end, y1=y, y2=y, class_="under"),
        element("line", x1=panel.x, x2=end, y1=y, y2=y, class_="budget"),
        element(
            "text",
            f"budget {format_bytes(budget_bytes)}",
            x=end - 6 if peak_is_left else panel.x + 6,
            y=y - 7,
            text_anchor="end" if peak_is_left else "start",
            class_="budget-text halo",
        ),
        data_budget_bytes=budget_bytes,
    )


def peak_dot(panel: Panel, peak_bytes: int, *, peak_share: float) -> Markup:
    """A dot at the peak with its figure above, shifted where it would leave the panel."""
    x, y = panel.x_of(peak_share), panel.y(peak_bytes)
    text = f"peak {format_bytes(peak_bytes)}"
    half = text_width(text) / 2
    middle = min(max(x, panel.x + half), panel.x + panel.width - half)
    return element(
        "g",
        element("circle", cx=x, cy=y, r=4, class_="dot"),
        element("text", text, x=middle, y=y - 10, text_anchor="middle", class_="strong halo"),
        class_="peak",
        data_bytes=peak_bytes,
    )


def mark_names(panel: Panel, marks: Sequence[tuple[float, str]]) -> Markup:
    """Names of instants, given as shares of the step, below the axis, wherever they fit without touching.

    Blocks are many and numbered: they get a tick and one row. Other names ("backward begins") get a line over
    the whole height and the rows below, so that none loses its place to the tenth block.
    """
    drawn: list[Markup] = []
    rows: list[list[tuple[float, float]]] = [[] for _ in range(_MARK_ROWS)]
    for share, name in marks:
        x = panel.x_of(share)
        numbered = any(map(str.isdigit, name))
        top = panel.bottom if numbered else panel.top
        drawn.append(
            element(
                "line",
                element("title", name),
                x1=x,
                x2=x,
                y1=top,
                y2=panel.bottom + 5,
                class_="axis" if numbered else "mark",
            )
        )
        drawn += _mark_name(name, x, panel, rows, range(1) if numbered else range(1, _MARK_ROWS))
    return element("g", *drawn, class_="marks")


def _mark_name(
    name: str, x: float, panel: Panel, rows: list[list[tuple[float, float]]], allowed: range
) -> list[Markup]:
    half = text_width(name, 11) / 2 + 4
    middle = min(max(x, panel.x + half), panel.x + panel.width - half)
    if 2 * half > panel.width:
        return []
    for i in allowed:
        if all(middle + half <= start or middle - half >= end for start, end in rows[i]):
            rows[i].append((middle - half, middle + half))
            y = panel.bottom + 18 + 15 * i
            return [element("text", name, x=middle, y=y, text_anchor="middle", class_="small")]
    return []
