"""The section of docs/codes.md on plans that run no product again, from the rows of benchmarks/approximate.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import rows_in, table

from slimgrad.types import format_bytes

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "approximate.jsonl"
INTRODUCTION = """\
The fastest plans whose activations are within a share of plain training's and that run no matrix product, attention or
convolution again, without codes (`exact`) and with codes whose error is at most 5 % of the gradient (`approximate`); forward
and backward alone (`python benchmarks/approximate.py`, `--autocast` for bf16). *Activations* are the ledger's most, as a part
of plain training's; of a model in bf16 autocast, of its own. Time: medians of turns in one process, against plain's. *Error*:
relative L2 of the gradient, and what the plan said that it would be; that of `exact` plans in bf16 is autocast's rounding, of
sums in another order. `offload_activations` and `selective_recompute` also move tensors to files."""


def section() -> list[str]:
    """Its parts, in Markdown."""
    rows = rows_in(ROWS)
    header = ("model", "plan", "activations", "of plain", "time", "error", "foretold", "methods")
    days = sorted({row["date"] for row in rows})
    where = f"{rows[0]['machine']['processor']}; {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    return ["## Plans with codes", INTRODUCTION, where, table(header, _cells(rows))]


def _cells(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        is_plain = row["contender"] == "plain"
        predicted = row.get("predicted_error", 0.0)
        yield (
            row["model"],
            row["contender"],
            format_bytes(row["activation_bytes"]),
            f"{row['activation_ratio']:.3f}",
            f"{row['time_ratio']:.2f}",
            "" if is_plain else f"{row['gradient_error']:.2%}",
            f"{predicted:.2%}" if predicted else "",
            ", ".join(f"`{name}`" for name in row.get("methods", ())),
        )
