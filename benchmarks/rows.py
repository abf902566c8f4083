"""Rows of results, one JSON object a line, each with the machine and the day that it was measured on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimgrad.measuring.machine import this_machine


def write_rows(
    path: Path, groups: Iterable[Iterable[Mapping[str, Any]]], by: Sequence[str] = ()
) -> None:
    """Write every row of every group; what is there already is written again after each group.

    Rows that the file had before stay where no new row agrees with them in all of ``by``; without ``by`` none stays.
    """
    machine, day = asdict(this_machine()), datetime.date.today().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    is_kept = by and path.exists()
    before: list[dict[str, Any]] = [json.loads(x) for x in path.open()] if is_kept else []
    rows: list[dict[str, Any]] = []
    for group in groups:
        made = [{**row, "machine": machine, "date": day} for row in group]
        replaced = [[row.get(name) for name in by] for row in made]
        before = [row for row in before if [row.get(name) for name in by] not in replaced]
        rows += made
        text = "\n".join(json.dumps(row, default=str) for row in before + rows)
        path.write_text(text + "\n")
