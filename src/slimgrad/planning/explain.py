"""Why this plan: which instants bind, what the last bytes cost, what more budget would buy, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from slimgrad.errors import BudgetError
from slimgrad.measuring.profile import Profile
from slimgrad.method import method_name
from slimgrad.planning.plan import allowed_by, solved
from slimgrad.planning.solve import Solution
from slimgrad.types import Budget, BudgetLike, Exactness, format_bytes, format_seconds

_BINDS = 0.005  # instants within this share of the peak hold it together with the highest


@dataclass(frozen=True)
class Instant:
    """An instant that reaches the peak, to within half a percent: what the step does there, and bytes by column."""

    where: str
    live_bytes: int
    columns: dict[str, int]


@dataclass(frozen=True)
class Other:
    """The plan for another budget: its peak, seconds a step, and how many places each method is used at."""

    budget_bytes: int
    peak_bytes: int
    seconds: float
    methods: dict[str, int]


@dataclass(frozen=True)
class Explanation:
    """What holds a plan where it is. Bytes and seconds a step.

    ``seconds_per_mib`` is the shadow price of memory: what a step would save if the budget were a little larger
    (0: nothing, the plan is as fast as plain training). ``more`` is the plan for 10 % more budget, ``less`` for 10 %
    less (None: nothing fits).
    """

    budget_bytes: int
    peak_bytes: int
    seconds: float
    plain_seconds: float
    binding: tuple[Instant, ...]
    seconds_per_mib: float
    more: Other
    less: Other | None
    smallest_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"What binds: {format_bytes(self.peak_bytes)} of {format_bytes(self.budget_bytes)}, reached at"
        ]
        for instant in self.binding:
            parts = sorted(instant.columns.items(), key=lambda item: -item[1])
            held = ", ".join(f"{format_bytes(b)} {c.replace('_', ' ')}" for c, b in parts if b)
            lines.append(f"  {instant.where}: {held}")
        price = format_seconds(self.seconds_per_mib)
        lines.append(
            f"Shadow price: one MiB more would save {price} a step"
            if self.seconds_per_mib > 0
            else "Shadow price: none, more memory would not make the step faster"
        )
        lines.append(_compared("10 % more budget", self.more, self.seconds))
        if self.less is not None:
            lines.append(_compared("10 % less", self.less, self.seconds))
        lines.append(
            f"The smallest peak that these methods reach: {format_bytes(self.smallest_bytes)}"
        )
        return "\n".join(lines)


def explain(
    profile: Profile,
    budget: BudgetLike,
    *,
    exactness: Exactness | str = Exactness.EXACT,
    error: float | None = None,
    allow: Sequence[str] = (),
    forbid: Sequence[str] = (),
    clip_grad_norm: float | None = None,
    allow_compile: bool | None = None,
    steps: int | None = None,
) -> Explanation:
    """Why ``plan`` with these arguments answers what it does; raises what it raises."""
    allowed = allowed_by(exactness, error, allow, clip_grad_norm, allow_compile, steps, forbid)
    limit, best = solved(profile, Budget.parse(budget), allowed)

    def at(num_bytes: int) -> Solution:
        return solved(profile, Budget(str(num_bytes), bytes=num_bytes), allowed)[1]

    step = max(2**20, limit // 50)
    faster = at(limit + step)
    more = int(1.1 * limit)
    try:
        less = _other(int(0.9 * limit), at(int(0.9 * limit)))
    except BudgetError:
        less = None
    return Explanation(
        budget_bytes=limit,
        peak_bytes=best.peak_bytes,
        seconds=best.seconds,
        plain_seconds=profile.seconds,
        binding=tuple(binding(best)),
        seconds_per_mib=max(0.0, best.seconds - faster.seconds) / (step / 2**20),
        more=_other(more, at(more)),
        less=less,
        smallest_bytes=solved(profile, Budget.parse("min"), allowed)[1].peak_bytes,
    )


def binding(best: Solution) -> list[Instant]:
    """The instants that reach the peak, one for each thing that the step does, highest first; four at most."""
    timeline = best.layout.timeline(best.changes)
    live = np.sum(list(timeline.columns.values()), axis=0)
    found: dict[str, Instant] = {}
    for slot in np.argsort(-live, kind="stable")[:2000]:
        if live[slot] < (1 - _BINDS) * live.max() or len(found) == 4:
            break
        where = best.layout.where(int(slot))
        columns = {c.value: int(v[slot]) for c, v in timeline.columns.items()}
        found.setdefault(where, Instant(where, int(live[slot]), columns))
    return list(found.values())


def _other(budget_bytes: int, solution: Solution) -> Other:
    used = [m for m, _ in solution.scheme.methods] + [
        m for o in solution.options for m in o.methods
    ]
    counted = Counter(method_name(m) for m in used)
    return Other(budget_bytes, solution.peak_bytes, solution.seconds, dict(sorted(counted.items())))


def _compared(name: str, other: Other, seconds: float) -> str:
    change = other.seconds - seconds
    gained = "the same time" if abs(change) < 1e-6 else f"{format_seconds(abs(change))} a step "
    gained += "" if abs(change) < 1e-6 else ("less" if change < 0 else "more")
    methods = (
        ", ".join(f"{n} x{c}" if c > 1 else n for n, c in other.methods.items())
        or "nothing changed"
    )
    return f"With {name} ({format_bytes(other.budget_bytes)}): {gained}; {methods}"
