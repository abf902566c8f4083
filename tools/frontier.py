"""Write docs/frontier.md and its plot from the rows of ``slimgrad bench frontier``: ``python tools/frontier.py [--check]``.

With ``--check`` nothing is written: the exit code is 1 if the page differs from what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pages import asked_to_check, is_current, out_of_date, table

from slimgrad.comparing.plot import save_png
from slimgrad.comparing.rows import Row, by_model, load_rows
from slimgrad.comparing.verdict import Duel, duels, prediction
from slimgrad.types import format_bytes, format_seconds

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "frontier.jsonl"
PAGE = ROOT / "docs" / "frontier.md"
PLOT = ROOT / "docs" / "images" / "frontier.png"
NOTE = (
    "<!-- Written by tools/frontier.py from benchmarks/results/frontier.jsonl: run `make docs`. -->"
)
INTRODUCTION = """\
One training step of each model, every contender in turns in one run of `slimgrad bench frontier`: plain training, the
ways to save memory that PyTorch has, slimgrad planned for budgets, and slimgrad planned for the peak that each peer was
measured to need, to within a thousandth. A time is the median over rounds, as a ratio to plain training's in the same
run; a peak is the most live bytes at any instant, as a ratio to plain training's. Against peers that compile nothing
slimgrad compiles nothing. The machine has 2 cores that others use as well; where some of slimgrad's plans are one and the
same, how far apart their times were measured is said below each model: no smaller difference counts."""


def page(rows: Sequence[Row]) -> str:
    """The page, in Markdown."""
    parts = ["# Time against peak", NOTE, INTRODUCTION, "![The frontiers](images/frontier.png)"]
    for model, group in by_model(rows).items():
        parts += _model(model, group)
    return "\n\n".join(parts) + "\n"


def _model(model: str, rows: Sequence[Row]) -> list[str]:
    plain = rows[0]
    facts = [f"plain: {format_bytes(plain.peak_bytes or 0)}, {format_seconds(plain.time_s or 0)}"]
    facts += [str(plain.machine.get("processor", "")), _threads(plain)]
    facts += [f"torch {plain.machine.get('torch', '')}"]
    facts += [f"commit {plain.machine.get('commit')}", plain.date or "", plain.note]
    parts = [f"## {model}", "; ".join(fact for fact in facts if fact) + "."]
    plans = [r for r in rows if r.kind == "slimgrad" and not r.contender.startswith("slimgrad@")]
    cells = [
        (r.budget or "", _of(r.peak_ratio), _of(r.time_ratio), _of(r.predicted_time_ratio))
        if r.error is None
        else (r.budget or "", r.error, "", "")
        for r in plans
    ]
    parts.append(
        table(("slimgrad's budget", "peak", "time", "predicted time"), cells)
        if cells
        else "No budgets were asked for."
    )
    approximate = [_approximate(r) for r in rows if r.kind == "approximate"]
    header = (
        "approximate, budget",
        "peak",
        "time",
        "predicted time",
        "gradient's error",
        "planned",
    )
    if approximate:
        parts.append(table(header, approximate))
    named = {row.contender: row for row in rows}
    fought = duels(rows)
    header = ("peer", "its peak", "its time", "slimgrad's peak", "its time", "of the peer's")
    if fought:
        parts.append(table(header, [_duel(d, named) for d in fought]))
    failed = [f"{r.contender}: {r.error}" for r in rows if r.kind == "peer" and r.error]
    if failed:
        parts.append("Not measured: " + "; ".join(failed) + ".")
    found = prediction(rows)
    if found is not None and found.median_time is not None and found.worst_time is not None:
        parts.append(
            f"Measured against predicted, {found.num_plans} plans: peak {found.worst_peak:+.1%} at worst, time "
            f"{found.median_time:+.1%} in the median, {found.worst_time:+.1%} at worst."
        )
    apart = _scatter(rows)
    if apart is not None:
        parts.append(f"Times of one and the same plan: up to {apart:.0%} apart.")
    return parts


def _threads(row: Row) -> str:
    num = row.machine.get("num_threads")
    return "" if num is None else f"{num} thread{'s' if num > 1 else ''}"


def _scatter(rows: Sequence[Row]) -> float | None:
    """By how much the slowest time of a plan that was measured more than once is above the fastest, at most."""
    times: dict[object, set[float]] = {}
    for row in rows:
        if row.is_measured and row.predicted_s is not None and row.time_s is not None:
            same = row.peak_bytes, row.activations_bytes, row.predicted_s, tuple(row.methods)
            times.setdefault(same, set()).add(row.time_s)
    return max((max(t) / min(t) - 1 for t in times.values() if len(t) > 1), default=None)


def _approximate(row: Row) -> tuple[str, ...]:
    if row.error is not None:
        return row.budget or "", row.error, "", "", "", ""
    ratios = (row.peak_ratio, row.time_ratio, row.predicted_time_ratio)
    errors = (row.gradient_error or 0.0, row.predicted_error or 0.0)
    return row.budget or "", *map(_of, ratios), *(f"{error:.2%}" for error in errors)


def _duel(duel: Duel, named: dict[str, Row]) -> tuple[str, ...]:
    peer, slim = named[duel.peer], named.get(f"slimgrad@{duel.peer}")
    mine = (_of(slim.peak_ratio), _of(slim.time_ratio)) if slim is not None else ("-", "-")
    return (
        duel.peer,
        _of(peer.peak_ratio),
        _of(peer.time_ratio),
        *mine,
        _of(duel.time_ratio) if duel.time_ratio is not None else duel.reason,
    )


def _of(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    is_check = asked_to_check(__doc__, arguments)
    rows = load_rows(ROWS)
    text = page(rows)
    if is_current(PAGE, text):
        return 0
    if is_check:
        return out_of_date(PAGE)
    PAGE.write_text(text, encoding="utf-8")
    save_png(rows, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
