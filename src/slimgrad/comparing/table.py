"""Results as tables for a terminal: time against peak, the duels, the errors of prediction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from slimgrad.comparing.rows import Row
from slimgrad.comparing.verdict import Duel, Prediction
from slimgrad.types import format_bytes, format_seconds

CONTENDER_COLUMNS = (
    "contender",
    "peak",
    "of plain",
    "predicted",
    "activations",
    "time",
    "of plain",
    "predicted",
    "gradient error",
    "",
)
DUEL_COLUMNS = ("peer", "its peak", "slimgrad's", "slimgrad's time to the peer's", "")
PREDICTION_COLUMNS = ("model", "plans", "peak, worst", "time, median", "time, worst")


def contender_cells(row: Row) -> list[str]:
    """One row of the table of contenders, as text."""
    remarks = [row.error or "", row.note]
    if row.compile_s is not None:
        remarks.append(f"compiled in {row.compile_s:.0f} s")
    if row.buffers_equal is False:
        remarks.append("buffers differ from plain's")
    if row.tightened_bytes:
        remarks.append(f"tightened by {format_bytes(row.tightened_bytes)}")
    return [
        row.contender,
        _bytes(row.peak_bytes),
        _ratio(row.peak_ratio),
        _bytes(row.predicted_peak_bytes),
        _bytes(row.activations_bytes),
        "-" if row.time_s is None else format_seconds(row.time_s),
        _ratio(row.time_ratio),
        _ratio(row.predicted_time_ratio),
        "-" if row.gradient_error is None else f"{row.gradient_error:.1e}",
        "; ".join(remark for remark in remarks if remark),
    ]


def duel_cells(duel: Duel) -> list[str]:
    """One row of the table of duels, as text."""
    return [
        duel.peer,
        _bytes(duel.peer_bytes),
        _bytes(duel.slim_bytes),
        _ratio(duel.time_ratio),
        duel.reason,
    ]


def prediction_cells(found: Prediction) -> list[str]:
    """One row of the table of predictions, as text."""
    return [
        found.model,
        str(found.num_plans),
        _share(found.worst_peak),
        _share(found.median_time),
        _share(found.worst_time),
    ]


def contenders_table(model: str, rows: Sequence[Row]) -> Table:
    """Time ratio against peak ratio, one row a contender."""
    return _table(
        f"{model}: peak and time of one step", CONTENDER_COLUMNS, map(contender_cells, rows)
    )


def duels_table(model: str, found: Sequence[Duel]) -> Table:
    """slimgrad planned for each peer's measured peak."""
    return _table(f"{model}: at each peer's peak", DUEL_COLUMNS, map(duel_cells, found))


def predictions_table(found: Sequence[Prediction]) -> Table:
    """Measured against predicted."""
    return _table(
        "slimgrad's predictions: measured / predicted - 1",
        PREDICTION_COLUMNS,
        map(prediction_cells, found),
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for i, name in enumerate(columns):
        is_text = i == 0 or not name
        table.add_column(
            name, justify="left" if is_text else "right", overflow="fold", no_wrap=bool(name)
        )
    for cells in rows:
        table.add_row(*cells)
    return table


def _bytes(size: int | None) -> str:
    return "-" if size is None else format_bytes(size)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
