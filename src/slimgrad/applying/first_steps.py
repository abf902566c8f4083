"""Measures the first steps under a plan, and tightens it between two steps where the budget was passed."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from slimgrad.errors import BudgetError, PlanTightened, SlimgradError
from slimgrad.host import Host
from slimgrad.measuring.ledger import Ledger
from slimgrad.measuring.randomness import kept_randomness
from slimgrad.planning.plan import Plan
from slimgrad.planning.tighten import Replan, tightened
from slimgrad.types import Budget, format_bytes, format_seconds

NUM_MEASURED = 3
"""The first step makes the optimizer's state, the second what it is read ahead into; the third is like all others."""
_MOST_TIGHTENINGS = 3


@dataclass(frozen=True)
class MeasuredStep:
    """The measured peak of one step, in bytes. ``predicted_bytes`` is what was predicted for a batch of its shape
    (of a batch smaller than planned for: for the one planned for)."""

    step: int
    peak_bytes: int
    predicted_bytes: int
    budget_bytes: int

    @property
    def over_bytes(self) -> int:
        """By how much the budget was passed; 0 where it was kept."""
        return max(0, self.peak_bytes - self.budget_bytes)


@dataclass(frozen=True)
class Tightening:
    """A plan made again after a measured step: ``reserve_bytes`` of the budget are kept free from then on."""

    measured: MeasuredStep
    reserve_bytes: int
    before: Plan = field(repr=False)
    after: Plan = field(repr=False)

    def __str__(self) -> str:
        seen = self.measured
        return (
            f"step {seen.step} was measured at {format_bytes(seen.peak_bytes)}, {format_bytes(seen.over_bytes)} "
            f"above the budget {self.before.budget} ({format_bytes(seen.predicted_bytes)} was predicted): the plan "
            f"was made again with {format_bytes(self.reserve_bytes)} kept free. Predicted peak "
            f"{format_bytes(self.before.peak_bytes)} -> {format_bytes(self.after.peak_bytes)}, predicted step "
            f"{format_seconds(self.before.seconds)} -> {format_seconds(self.after.seconds)}"
        )


@dataclass
class Peak:
    """The most bytes that were live on the device; set when the measured body ends."""

    bytes: int = 0


class Tightenable(Protocol):
    """A step whose plan can be exchanged."""

    plan: Plan
    host: Host

    def ledger(self, batch: Any = None) -> Ledger:
        """A ledger over the step's model and optimizer."""
        ...

    def change_to(self, plan: Plan) -> None:
        """Apply another plan in place of this one."""
        ...


class FirstSteps:
    """Measures ``left`` more steps; where one passes the budget, the plan is tightened and as many are measured again.

    ``replan`` None: nothing is measured.
    """

    def __init__(self, replan: Replan | None = None, num_measured: int = NUM_MEASURED) -> None:
        self.replan, self.num_measured = replan, num_measured
        self.left = 0 if replan is None else num_measured
        self.history: list[MeasuredStep] = []
        self.tightenings: list[Tightening] = []
        self.failure: BudgetError | None = None

    def check(self) -> None:
        """Raise ``BudgetError`` where a measured step passed the budget and no plan is leaner."""
        if self.failure is not None:
            raise BudgetError(
                str(self.failure),
                smallest_bytes=self.failure.smallest_bytes,
                by_rung=self.failure.by_rung,
            )

    @contextmanager
    def measuring(self, step: Tightenable, batch: Any) -> Generator[Peak]:
        """The peak of the body: by the ledger, or by the allocator's own count on CUDA (which is set back to zero)."""
        peak, device = Peak(), step.host.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            yield peak
            peak.bytes = torch.cuda.max_memory_allocated(device)
        else:
            with step.ledger(batch) as ledger:
                yield peak
            peak.bytes = ledger.peak_bytes

    def judge(self, step: Tightenable, measured: MeasuredStep) -> None:
        """Note a measured step. Where it passed the budget, tighten the plan and tell it by ``PlanTightened``.

        Where no plan is leaner nothing is changed, and ``check`` raises from then on.
        """
        self.left -= 1
        self.history.append(measured)
        if not measured.over_bytes or Budget.parse(step.plan.budget).is_min or self.replan is None:
            return
        if len(self.tightenings) >= _MOST_TIGHTENINGS:
            self.failure = _still_over(measured, step.plan)
            return
        before = step.plan
        try:
            with kept_randomness():
                after = tightened(
                    before, self.replan, measured.peak_bytes, measured.predicted_bytes
                )
                step.change_to(after)
        except BudgetError as error:
            self.failure = error
            return
        except SlimgradError as error:  # the old plan is attached again
            self.failure = _not_attached(measured, before, error)
            return
        self.left = self.num_measured
        self.tightenings.append(Tightening(measured, after.tightened_bytes, before, after))
        warnings.warn(str(self.tightenings[-1]), PlanTightened, stacklevel=3)


def _still_over(measured: MeasuredStep, plan: Plan) -> BudgetError:
    return BudgetError(
        f"step {measured.step} was measured at {format_bytes(measured.peak_bytes)}, still "
        f"{format_bytes(measured.over_bytes)} above the budget {plan.budget} after {_MOST_TIGHTENINGS} tightened "
        "plans. Give a larger budget",
        smallest_bytes=measured.peak_bytes,
    )


def _not_attached(measured: MeasuredStep, plan: Plan, error: SlimgradError) -> BudgetError:
    return BudgetError(
        f"step {measured.step} was measured at {format_bytes(measured.peak_bytes)}, above the budget {plan.budget}, "
        f"and a leaner plan could not be attached: {error}",
        smallest_bytes=measured.peak_bytes,
    )
