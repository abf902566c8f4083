"""The vocabulary: bytes, budgets, columns of the ledger and rungs of exactness. Imports nothing of ours."""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import NewType, TypeAlias

from slimgrad.errors import BudgetFormatError

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)

BudgetLike: TypeAlias = "int | float | str | Budget"
"""What a user may write for a budget: bytes, ``"1.5GiB"``, ``"40%"`` of the plain peak, or ``"min"``."""

_UNITS = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_BUDGET = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(%|[a-z]*)\s*$", re.IGNORECASE)


class Column(enum.StrEnum):
    """The six kinds of bytes that the ledger tells apart, in the order in which they are shown."""

    WEIGHTS = "weights"
    OPTIMIZER_STATE = "optimizer_state"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    TEMPORARIES = "temporaries"
    INPUTS = "inputs"


class Exactness(enum.StrEnum):
    """How far an update may depart from plain training: a ladder, strictest rung first.

    ``bitwise``: the same bits. ``exact``: the same up to rounding. ``unbiased``: a random gradient with the
    true mean. ``approximate``: biased, its error bounded. ``different``: another rule or other weights.
    """

    BITWISE = "bitwise"
    EXACT = "exact"
    UNBIASED = "unbiased"
    APPROXIMATE = "approximate"
    DIFFERENT = "different"

    @property
    def rung(self) -> int:
        """Position on the ladder: 0 is the strictest."""
        return list(Exactness).index(self)

    def allows(self, other: Exactness) -> bool:
        """Whether a method on rung ``other`` may be used where this rung is the loosest allowed."""
        return other.rung <= self.rung


@dataclass(frozen=True)
class Budget:
    """A memory budget: absolute bytes, a share of the plain peak, or the smallest reachable peak.

    Exactly one of ``bytes`` and ``share`` is set, or neither for ``"min"``.
    """

    text: str
    bytes: int | None = None
    share: float | None = None

    @staticmethod
    def parse(value: BudgetLike) -> Budget:
        """Read ``value`` as a budget.

        Raises ``BudgetFormatError`` for anything that is not a positive number of bytes, a size such as
        ``"1.5GiB"``, a percentage such as ``"40%"``, or ``"min"``.

        >>> Budget.parse("1.5GiB").bytes
        1610612736
        >>> Budget.parse("40%").share
        0.4
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, float) and value.is_integer():
            return Budget.parse(int(value))
        if isinstance(value, (bool, float)) or not isinstance(value, (int, str)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise BudgetFormatError(value)
        if isinstance(value, int):
            if value <= 0:
                raise BudgetFormatError(value)
            return Budget(format_bytes(value), bytes=value)
        if value.strip().lower() == "min":
            return Budget("min")
        match = _BUDGET.match(value)
        if match is None:
            raise BudgetFormatError(value)
        number, unit = float(match[1]), match[2].lower()
        if unit == "%":
            if not 0 < number <= 100:
                raise BudgetFormatError(value)
            return Budget(value.strip(), share=number / 100)
        if unit and unit not in _UNITS:
            raise BudgetFormatError(value)
        size = number * _UNITS[unit or "b"]
        num_bytes = int(size) if math.isfinite(size) else 0
        if num_bytes <= 0:
            raise BudgetFormatError(value)
        return Budget(value.strip(), bytes=num_bytes)

    @property
    def is_min(self) -> bool:
        """Whether the smallest reachable peak is asked for."""
        return self.bytes is None and self.share is None

    def resolve(self, plain_peak_bytes: int) -> int | None:
        """The budget in bytes for a model whose plain step peaks at ``plain_peak_bytes``; None for ``"min"``."""
        if self.share is not None:
            return int(self.share * plain_peak_bytes)
        return self.bytes


def format_bytes(num_bytes: float) -> str:
    """``num_bytes`` for a reader, in binary units.

    >>> format_bytes(1610612736)
    '1.50 GiB'
    """
    sign, size = ("-" if num_bytes < 0 else ""), abs(float(num_bytes))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= 1024
    return f"{sign}{size:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """``seconds`` for a reader.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"
