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
    path: Path, groups: Iterable[Iterable[Mapping[str, Any]]], key: Sequence[str] = ()
) -> None:
    """Write every row of every group; what is there already is written again after each group.

    With ``key``, rows of an earlier run stay unless a new one has the same values of these fields, or lacks them too.
    """
    machine, day = asdict(this_machine()), datetime.date.today().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(path) if key else []
    for group in groups:
        new = [{**row, "machine": machine, "date": day} for row in group]
        if key:
            told = [[row.get(k) for k in key] for row in new]
            rows = [row for row in rows if [row.get(k) for k in key] not in told]
        rows += new
        path.write_text("\n".join(json.dumps(row, default=str) for row in rows) + "\n")


def read_rows(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
