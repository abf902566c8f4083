"""Each method for your own code on one model of its kind: bytes by column, and time, beside plain and a peer.

    python benchmarks/methods.py [--kinds attention,loss,...] [--rounds 5] [--out benchmarks/results/methods.jsonl]

One line a way. Bytes are the ledger's maxima by column over a forward and backward pass; times are medians of passes
in turns in this one process, as ratios to plain's. Every figure is of the machine that the line names.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layer_kinds import LAYER_KINDS
from model_kinds import MODEL_KINDS
from rows import write_rows
from slimgrad.types import format_bytes

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
KINDS = LAYER_KINDS | MODEL_KINDS


def bench(kind: str, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ways = KINDS[kind]()
    columns = [way.columns() for way in ways]
    for _ in range(rounds):
        for way in ways:
            way.turn()
    plain_s = median(ways[0].times_s)
    rows = []
    for way, held in zip(ways, columns, strict=True):
        row = {
            "kind": kind,
            "about": KINDS[kind].__doc__,
            "way": way.name,
            **{f"{c}_bytes": b for c, b in held.items()},
        }
        row["time_ratio"] = median(way.times_s) / plain_s
        rows.append(row)
        print(
            f"{kind:12} {way.name:28} peak {format_bytes(held['peak']):>10} activations "
            f"{format_bytes(held['activations']):>10} temporaries {format_bytes(held['temporaries']):>10} "
            f"time {row['time_ratio']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    groups = (bench(kind, chosen.rounds) for kind in chosen.kinds.split(","))
    write_rows(chosen.out, groups, key=("kind",))


if __name__ == "__main__":
    main()
