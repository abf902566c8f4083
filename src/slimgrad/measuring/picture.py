"""The picture of a step: live bytes by column at each instant, several steps side by side on one scale."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from slimgrad.measuring.panel import Panel, budget_line, mark_names, peak_dot
from slimgrad.measuring.svg import column_title, element, fill, picture, shortened, text_width
from slimgrad.types import Column, format_bytes

_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 78.0, 14.0, 34.0, 58.0, 26.0
_BIN_WIDTH = 1.5  # pixels: a peak of one instant stays visible


@dataclass(frozen=True)
class Timeline:
    """One step: the live bytes of each column at each instant, and names of instants.

    ``columns`` maps names of ``Column`` to equally long sequences of bytes (an absent column is zero);
    ``marks`` are pairs of an instant and its name ("backward begins"). Raises ValueError for columns that are
    unknown, unequal in length or empty.
    """

    label: str
    columns: Mapping[str, Sequence[int]]
    marks: Sequence[tuple[int, str]] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(Column))
        if unknown:
            raise ValueError(f"expected columns among {[*map(str, Column)]}, found {unknown}")
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(
                f"expected columns of one length, at least one instant; found {lengths}"
            )

    @property
    def num_instants(self) -> int:
        """How many instants the step has."""
        return len(next(iter(self.columns.values())))

    def stack(self) -> NDArray[np.int64]:
        """Bytes, one row a column in ``Column`` order and one column an instant."""
        zeros = [0] * self.num_instants
        return np.array([self.columns.get(name, zeros) for name in Column], dtype=np.int64)

    @property
    def peak_instant(self) -> int:
        """The first instant with the most bytes."""
        return int(self.stack().sum(axis=0).argmax())

    @property
    def peak_bytes(self) -> int:
        """The most bytes live at any instant."""
        return int(self.stack().sum(axis=0).max())

    def at_peak(self) -> dict[str, int]:
        """Bytes by column at the peak."""
        return {
            name: int(row[self.peak_instant])
            for name, row in zip(Column, self.stack(), strict=True)
        }


def downsample(totals: NDArray[np.int64], num_bins: int) -> NDArray[np.int64]:
    """The instant that stands for each of at most ``num_bins`` equal bins: the one with the most bytes.

    No maximum is lost: the largest of ``totals`` is among the instants returned.
    """
    if len(totals) <= num_bins:
        return np.arange(len(totals))
    edges = np.linspace(0, len(totals), num_bins + 1).astype(np.int64)
    return np.array([start + totals[start:stop].argmax() for start, stop in pairwise(edges)])


def timeline_svg(
    timelines: Sequence[Timeline],
    budget_bytes: int | None = None,
    width: float = 1120,
    height: float = 450,
) -> str:
    """Stacked areas of the columns over the step, one panel a timeline, all on the same vertical scale.

    The budget is a dashed line; each peak is marked with its figure. Long steps are drawn by the highest
    instant of each pixel or so, so that the drawn peak is the true one. Raises ValueError without a timeline.
    """
    if not timelines:
        raise ValueError("expected at least one timeline to draw, found none")
    peaks = [timeline.peak_bytes for timeline in timelines]
    scale_bytes = 1.14 * max(*peaks, budget_bytes or 0, 1)  # room above the peak for its figure
    room = (width - _LEFT - _RIGHT - _GAP * (len(timelines) - 1)) / len(timelines)
    legend, legend_height = _legend(timelines, width, height)
    bottom = height - _BOTTOM - legend_height
    panels = [
        Panel(_LEFT + i * (room + _GAP), room, _TOP, bottom, scale_bytes)
        for i in range(len(timelines))
    ]
    drawn = [_panel(t, p, budget_bytes) for t, p in zip(timelines, panels, strict=True)]
    label = "Live bytes over one training step: " + "; ".join(
        f"{timeline.label} peaks at {format_bytes(timeline.peak_bytes)}" for timeline in timelines
    )
    return picture(
        width,
        height,
        element("rect", width=width, height=height, class_="paper"),
        _scale(panels, scale_bytes),
        *drawn,
        legend,
        prefix="step",
        label=label + (f"; the budget is {format_bytes(budget_bytes)}" if budget_bytes else ""),
    )


def _scale(panels: Sequence[Panel], scale_bytes: float) -> Markup:
    """Grid lines at powers of two of a byte unit, labelled once at the left."""
    step = 2 ** max(0, math.ceil(math.log2(scale_bytes / 6)))
    lines: list[Markup] = []
    for i in range(int(scale_bytes / step) + 1):
        y = panels[0].y(i * step)
        name = format_bytes(i * step).replace(".0 ", " ").replace(".00 ", " ")
        lines.append(element("text", name, x=_LEFT - 8, y=y + 4, text_anchor="end", class_="small"))
        lines += [
            element("line", x1=p.x, x2=p.x + p.width, y1=y, y2=y, class_="grid") for p in panels
        ]
    return element("g", *lines)


def _legend(timelines: Sequence[Timeline], width: float, height: float) -> tuple[Markup, float]:
    """The names of the columns that appear, in rows at the bottom; and how high the rows are."""
    x, row, places = _LEFT, 0, list[tuple[str, float, int]]()
    for column in Column:
        if not any(any(timeline.columns.get(column, ())) for timeline in timelines):
            continue
        needed = text_width(column_title(column)) + 46
        if x > _LEFT and x + needed > width - _RIGHT:
            x, row = _LEFT, row + 1
        places.append((column, x, row))
        x += needed
    top = height - 22.0 * (row + 1)
    drawn: list[Markup] = []
    for column, x, i in places:
        y, name = top + 22 * i, column_title(column)
        drawn.append(
            element("rect", x=x, y=y, width=22, height=13, rx=2, fill=fill("step", column))
        )
        drawn.append(element("text", name, x=x + 29, y=y + 11))
    return element("g", *drawn, class_="legend"), height - top + 8


def _panel(timeline: Timeline, panel: Panel, budget_bytes: int | None) -> Markup:
    stack = timeline.stack()
    chosen = downsample(stack.sum(axis=0), max(2, int(panel.width / _BIN_WIDTH)))
    end = panel.x + panel.width
    peak_share = (timeline.peak_instant + 0.5) / timeline.num_instants
    title = shortened(timeline.label, panel.width, 14)
    return element(
        "g",
        element("text", title, x=panel.x, y=20, class_="strong"),
        *_layers(stack[:, chosen], panel),
        element("line", x1=panel.x, x2=end, y1=panel.bottom, y2=panel.bottom, class_="axis"),
        mark_names(panel, [(i / timeline.num_instants, name) for i, name in timeline.marks]),
        budget_line(panel, budget_bytes, peak_share=peak_share),
        peak_dot(panel, timeline.peak_bytes, peak_share=peak_share),
        class_="panel",
        data_x=panel.x,
        data_width=panel.width,
        data_top=panel.top,
        data_bottom=panel.bottom,
        data_scale_bytes=panel.scale_bytes,
        data_columns=json.dumps(stack[:, chosen].tolist(), separators=(",", ":")),
        data_label=timeline.label,
    )


def _layers(stack: NDArray[np.int64], panel: Panel) -> list[Markup]:
    """One closed path a column. Live bytes are constant between events, so the outlines are steps."""
    edges = np.linspace(panel.x, panel.x + panel.width, stack.shape[1] + 1)
    tops = np.vstack([np.zeros(stack.shape[1], dtype=np.int64), stack.cumsum(axis=0)])
    layers: list[Markup] = []
    for column, below, above in zip(Column, tops, tops[1:], strict=False):
        if np.array_equal(below, above):
            continue
        upper = _steps(edges, [panel.y(v) for v in above])
        lower = reversed(_steps(edges, [panel.y(v) for v in below]))
        points = [f"{x:.2f},{y:.2f}" for x, y in (*upper, *lower)]
        layers.append(
            element(
                "path",
                element("title", column_title(column)),
                d=f"M{' L'.join(points)} Z",
                fill=fill("step", column),
                class_="layer",
                data_column=column,
            )
        )
    skyline = [f"{x:.2f},{y:.2f}" for x, y in _steps(edges, [panel.y(v) for v in tops[-1]])]
    return [*layers, element("polyline", points=" ".join(skyline), class_="skyline")]


def _steps(edges: NDArray[np.float64], ys: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of a staircase, leaving out those on a straight line."""
    corners: list[tuple[float, float]] = []
    for left, right, y in zip(edges, edges[1:], ys, strict=False):
        if corners and corners[-1][1] == y:
            corners[-1] = (float(right), y)
        else:
            corners += [(float(left), y), (float(right), y)]
    return corners
