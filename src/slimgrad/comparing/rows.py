"""Rows of results: one a model and contender, with the machine they are of. Saved as JSON, one row a line."""

from __future__ import annotations

import datetime
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

import slimgrad
from slimgrad.errors import StorageError
from slimgrad.measuring.machine import this_machine


@dataclass
class Row:
    """What was measured of one contender on one model. None: not measured, or without meaning for it.

    ``peak_bytes`` is the ledger's on a CPU and the allocator's on CUDA; of compiled steps, which no ledger sees
    into, it is that of the profiler's allocation events (``peak_from`` says which). ``allocator_bytes`` is
    the profiler's for every contender on a CPU, kernels' workspaces included; an upper bound where a step keeps
    tensors of its own for the next one (offloading), since the profiler does not see those freed. Ratios are to plain training: peaks of one kind, medians of
    times. ``gradient_error`` is the relative L2 distance of one step's gradients to plain's.
    """

    model: str
    contender: str
    kind: str  # plain, peer, slimgrad or approximate (slimgrad of that rung)
    compiled: bool = False
    budget: str | None = None
    peak_from: str = ""
    peak_bytes: int | None = None
    allocator_bytes: int | None = None
    activations_bytes: int | None = None
    temporaries_bytes: int | None = None
    peak_ratio: float | None = None
    predicted_peak_bytes: int | None = None
    predicted_s: float | None = None
    predicted_time_ratio: float | None = None
    time_s: float | None = None
    times_s: list[float] = field(default_factory=list)
    time_ratio: float | None = None
    gradient_error: float | None = None
    predicted_error: float | None = None
    buffers_equal: bool | None = None
    compile_s: float | None = None
    measuring_s: float | None = None
    planning_s: float | None = None
    tightened_bytes: int | None = None
    smallest_bytes: int | None = None
    methods: list[str] = field(default_factory=list)
    note: str = ""
    error: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether both ratios are there: the row is a point of the picture."""
        return self.peak_ratio is not None and self.time_ratio is not None

    def peak_like(self, plain: Row) -> int | None:
        """The peak in the bytes that plain's is measured in: what slimgrad is given for a budget.

        Of a compiled step its share of plain's peak by the profiler, taken of plain's own peak: kernels'
        workspaces, which the profiler counts and the ledger does not, are in both or in neither.
        """
        if self.peak_from == plain.peak_from or self.peak_bytes is None:
            return self.peak_bytes
        if not plain.allocator_bytes or not plain.peak_bytes:
            return None
        return int(self.peak_bytes / plain.allocator_bytes * plain.peak_bytes)

    def compare(self, plain: Row) -> None:
        """Fill in the median time and the ratios to ``plain``."""
        self.time_s = median(self.times_s) if self.times_s else None
        if self.time_s is not None and plain.times_s:
            self.time_ratio = self.time_s / median(plain.times_s)
        peak = self.peak_like(plain)
        if peak is not None and plain.peak_bytes:
            self.peak_ratio = peak / plain.peak_bytes


def measured_on(device: torch.device) -> dict[str, Any]:
    """The machine of a row: processor, cores, threads, device, versions, and the commit where there is one."""
    machine = this_machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.processor
    return {
        "processor": machine.processor,
        "num_cores": machine.num_cores,
        "num_threads": machine.num_threads,
        "memory_bytes": machine.memory_bytes,
        "device": name,
        "python": machine.python,
        "torch": torch.__version__,
        "slimgrad": slimgrad.__version__,
        "commit": _commit(),
    }


def today() -> str:
    """The date of a row."""
    return datetime.date.today().isoformat()


def _commit() -> str | None:
    """The commit that this code is checked out at, marked where files differ from it; None outside git."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def to_json(row: Row) -> str:
    """The row as one line of JSON."""
    return json.dumps(asdict(row), default=str)


def save_rows(rows: Iterable[Row], path: Path) -> None:
    """Write one row a line, over what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")


def load_rows(path: Path) -> list[Row]:
    """Rows written by ``save_rows``; raises ``StorageError`` for a file that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [_row(json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is not a file of a comparison's rows: {error}") from error


def _row(data: Mapping[str, Any]) -> Row:
    return Row(**data)


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each model, in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(row)
    return found
