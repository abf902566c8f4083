"""The section of docs/codes.md on MiniLM fine-tuned in full and in part, from the rows of benchmarks/topics.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pages import rows_in, table

from slimgrad.types import format_bytes

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "topics.jsonl"
INTRODUCTION = """\
No code here: the same topics, batches and order (`python benchmarks/topics.py`), with AdamW on what trains. `full` trains
every parameter, `meft` adapters in an encoder made reversible, `sparse` the tensors that `sparse_update` chooses for half
of the peak, `head` the last layer alone. Rates are the best of two
to four tried on a seed that no row is of; MEFT's last layer has the rate of `head`. Bytes are the ledger's in
the second step: the largest activations, and the peak with weights, gradients and the optimizer's state (updates after
backward). Accuracy: points on what was not trained on, above full tuning's by seed. In so few steps the last layer alone
learns about as much as all of them: this task does not tell MEFT or a sparse update from full tuning."""


def section(num_last: int) -> list[str]:
    """Its parts, in Markdown; the final loss is the mean of the last ``num_last`` steps'."""
    rows = rows_in(ROWS)
    ways: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        ways.setdefault(row["way"], []).append(row)
    ways = dict(sorted(ways.items(), key=lambda item: -item[1][0]["trained_parameters"]))
    full = {row["seed"]: row["accuracy"] for row in ways["full"]}
    first = ways["full"][0]
    facts = f"{len(full)} seeds, {first['steps']} steps; {first['machine']['processor']}; {first['date']}."
    header = ("way", "rate", "trained", "activations", "peak", "loss", "accuracy", "above full")
    cells = [_cells(way, ways[way], full, num_last) for way in ways]
    return ["## minilm in part", INTRODUCTION, facts, table(header, cells)]


def _cells(
    way: str, rows: Sequence[dict[str, Any]], full: dict[int, float], num_last: int
) -> tuple[str, ...]:
    first = rows[0]
    points = [100 * (row["accuracy"] - full[row["seed"]]) for row in rows]
    return (
        f"`{way}`",
        f"{first['lr']:.0e}",
        f"{first['trained_parameters'] / 1e6:.2f} M",
        format_bytes(first["activation_bytes"]),
        format_bytes(first["peak_bytes"]),
        f"{mean(mean(row['losses'][-num_last:]) for row in rows):.3f}",
        f"{mean(row['accuracy'] for row in rows):.1%}",
        f"{mean(points):+.1f} ± {stdev(points):.1f}",
    )
