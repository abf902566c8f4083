"""The comparison as one HTML file that needs no network: pictures, tables, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from slimgrad.comparing.drawing import frontier_svg
from slimgrad.comparing.rows import Row, by_model
from slimgrad.comparing.table import (
    CONTENDER_COLUMNS,
    DUEL_COLUMNS,
    PREDICTION_COLUMNS,
    contender_cells,
    duel_cells,
    prediction_cells,
)
from slimgrad.comparing.verdict import duels, prediction

_TEMPLATE = Path(__file__).with_name("report.html.j2")


def save_html(rows: Sequence[Row], path: Path) -> Path:
    """Write the page; returns the path."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    groups = by_model(rows)
    models: list[dict[str, Any]] = [
        {
            "name": model,
            "picture": Markup(frontier_svg(model, group)),
            "contenders": _cells(CONTENDER_COLUMNS, contender_cells, group),
            "duels": _cells(DUEL_COLUMNS, duel_cells, duels(group)),
        }
        for model, group in groups.items()
    ]
    found = [p for group in groups.values() if (p := prediction(group)) is not None]
    machine = rows[0].machine if rows else {}
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in machine.items()]
    text = template.render(
        models=models,
        predictions=_cells(PREDICTION_COLUMNS, prediction_cells, found),
        facts=facts,
        date=rows[0].date if rows else "",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _cells(
    columns: Sequence[str], cells: Callable[[Any], list[str]], found: Iterable[Any]
) -> dict[str, Any]:
    return {"columns": columns, "rows": [cells(one) for one in found]}
