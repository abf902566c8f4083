"""What ``verify`` found: figures, and whether they are what the plan promised."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from slimgrad.types import Exactness, format_bytes


@dataclass
class Report:
    """One verified step. Errors are relative L2 norms over all parameters together; ``None``: not measured.

    ``plain_gradient_error`` is plain training's own distance to float64, the measure of the rest;
    ``float64_gradient_error`` that of the planned step. ``mode`` is ``"step"`` where a plain step could be run
    beside, ``"blocks"`` where it would not fit and blocks were compared one at a time.
    """

    peak_bytes: int
    predicted_peak_bytes: int
    plain_peak_bytes: int
    budget_bytes: int
    rung: Exactness
    error: float | None = None  # that the plan's rung allows the gradient
    mode: str = "step"
    loss_error: float | None = None
    gradient_error: float | None = None
    plain_gradient_error: float | None = None
    float64_gradient_error: float | None = None
    update_error: float | None = None
    buffers_equal: bool | None = None
    random_equal: bool | None = None
    control_failed: bool | None = None
    time_ratio: float | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)  # parameters whose plain gradient is not

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(self.checks.values())

    @property
    def within_budget(self) -> bool:
        """Whether the measured peak is within the budget."""
        return self.peak_bytes <= self.budget_bytes

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"passed": self.passed, "within_budget": self.within_budget}

    def rows(self) -> list[tuple[str, str, bool | None]]:
        """What was checked, the figure, and whether it passed (None: told, not judged)."""
        peak = f"{format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}"
        off = self.peak_bytes / self.predicted_peak_bytes - 1 if self.predicted_peak_bytes else 0.0
        rows: list[tuple[str, str, bool | None]] = [
            ("peak within budget", peak, self.within_budget),
            ("peak against prediction", f"{off:+.2%}", None),
            ("plain peak", format_bytes(self.plain_peak_bytes), None),
        ]
        figures = (
            ("loss", self.loss_error),
            ("gradient", self.gradient_error),
            ("gradient against float64", self.float64_gradient_error),
            ("plain's own gradient against float64", self.plain_gradient_error),
            ("update", self.update_error),
        )
        for name, value in figures:
            if value is not None:
                shown = "0 (same bits)" if value == 0 else f"{value:.2e}"
                rows.append((f"relative error of {name}", shown, self.checks.get(name)))
        for name in ("buffers", "random state", "control"):
            if name in self.checks:
                rows.append(
                    (name, "as it must" if self.checks[name] else "differs", self.checks[name])
                )
        if self.time_ratio is not None:
            rows.append(("time against plain", f"{self.time_ratio:.2f}", None))
        return rows

    def __str__(self) -> str:
        marks = {True: "ok", False: "FAILED", None: ""}
        lines = [
            f"{name:<54}{figure:>22}  {marks[ok]}".rstrip() for name, figure, ok in self.rows()
        ]
        return "\n".join([*lines, *self.notes])
