"""Write docs/own_code.md from the rows of benchmarks/methods.py: ``python tools/methods.py [--check]``.

With ``--check`` nothing is written: the exit code is 1 if the page differs from what would be written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import asked_to_check, rows_in, table, written_or_checked

from slimgrad.types import format_bytes

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "methods.jsonl"
LONGEST = ROOT / "benchmarks" / "results" / "longest.jsonl"
PAGE = ROOT / "docs" / "own_code.md"
METHODS = ROOT / "docs" / "methods"
NOTE = "<!-- Written by tools/methods.py from benchmarks/results/methods.jsonl and longest.jsonl: run `make docs`. -->"
INTRODUCTION = """\
What methods for your own code (layers, losses, samplers: what a plan cannot choose, since the model has to be written with
them) give on one model of each kind, beside plain PyTorch and what else there is: `python benchmarks/methods.py`. Bytes are
the ledger's, the most of each column during a forward and backward pass. A time is the median of passes in turns in one
process, as a ratio to plain's, on a machine whose two cores others use as well: differences of a tenth do not count."""
LONG = """\
A model of SmolLM2-135M's shape, one sequence a batch, every parameter trained in float32: the longest sequence, in steps of
128 tokens, whose step stays within the budget (`python benchmarks/longest.py`)."""


def page(rows: Sequence[dict[str, Any]], longest: Sequence[dict[str, Any]]) -> str:
    """The page: a section a kind, and the longest sequences."""
    parts = ["# Methods for your own code", NOTE, INTRODUCTION]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind]
        machine = mine[0]["machine"]
        parts += [
            f"## {kind[0].upper()}{kind[1:]}",
            mine[0]["about"],
            table(["way", "peak", "activations", "temporaries", "time"], map(_cells, mine)),
            f"{machine['processor']}; {machine['num_threads']} thread(s); {mine[0]['date']}.",
        ]
    parts += ["## The longest sequence", LONG, _longest(longest)]
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    columns = ("peak", "activations", "temporaries")
    sizes = [format_bytes(row[f"{column}_bytes"]) for column in columns]
    return [_linked(row["way"]), *sizes, f"{row['time_ratio']:.2f}"]


def _linked(way: str) -> str:
    """The way's name, with a link to its page where it has one."""
    name, _, rest = way.partition(",")
    if not (METHODS / f"{name}.md").exists():
        return way
    return f"[`{name}`](methods/{name}.md)" + (f",{rest}" if rest else "")


def _longest(rows: Sequence[dict[str, Any]]) -> str:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    tokens = {(row["optimizer"], row["way"]): f"{row['tokens']:,}" for row in rows}
    budgets = {row["optimizer"]: format_bytes(row["budget_bytes"]) for row in rows}
    cells = [
        [name, budget, *(tokens.get((name, way), "") for way in ways)]
        for name, budget in budgets.items()
    ]
    return table(["optimizer", "budget", *(f"{way}, tokens" for way in ways)], cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit code."""
    text = page(rows_in(ROWS), rows_in(LONGEST))
    return written_or_checked(PAGE, text, asked_to_check(__doc__, arguments))


if __name__ == "__main__":
    sys.exit(main())
