"""The frontiers of all models as one PNG, by matplotlib (extra: plots)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slimgrad.comparing.drawing import (
    approximate_points,
    frontier_points,
    other_points,
    planned_for_peers,
)
from slimgrad.comparing.rows import Row, by_model
from slimgrad.errors import UnsupportedError


def save_png(rows: Sequence[Row], path: Path) -> Path:
    """Draw one panel a model; returns the path.

    Raises ``UnsupportedError`` where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError(
            "matplotlib is not installed: pip install 'slimgrad[plots]' (the HTML page has the same picture)"
        ) from None
    groups = by_model(rows)
    num_columns = min(2, max(1, len(groups)))
    num_rows = max(1, math.ceil(len(groups) / num_columns))
    figure: Any = Figure(figsize=(8 * num_columns, 5 * num_rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (model, group) in enumerate(groups.items()):
        _panel(figure.add_subplot(num_rows, num_columns, i + 1), model, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _panel(axes: Any, model: str, rows: Sequence[Row]) -> None:
    series = [
        (frontier_points(rows), "o-", {"color": "C0", "label": "slimgrad"}),
        (planned_for_peers(rows), ".", {"color": "C0"}),
        (approximate_points(rows), "o--", {"color": "C9", "label": "slimgrad, approximate"}),
    ]
    for points, shape, style in series:
        if points:
            ratios = [r.peak_ratio for r in points], [r.time_ratio for r in points]
            axes.plot(*ratios, shape, zorder=3, **style)
    shapes = "sDv^<>pPX*hd"
    for i, row in enumerate(other_points(rows)):
        axes.plot(
            [row.peak_ratio],
            [row.time_ratio],
            shapes[i % len(shapes)],
            color=f"C{1 + i % 8}",
            markersize=8,
            label=row.contender,
        )
    axes.set(title=model, xlabel="peak / plain", ylabel="time / plain")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
