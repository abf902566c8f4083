"""Rows of results, one JSON object a line, each with the machine and the day that it was measured on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slimgrad.measuring.machine import this_machine


def write_rows(path: Path, groups: Iterable[Iterable[Mapping[str, Any]]]) -> None:
    """Write every row of every group; what is there already is written again after each group."""
    machine, day = asdict(this_machine()), datetime.date.today().isoformat()
    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for group in groups:
        lines += [
            json.dumps({**row, "machine": machine, "date": day}, default=str) for row in group
        ]
        path.write_text("\n".join(lines) + "\n")
