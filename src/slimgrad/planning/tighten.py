"""Makes a plan again with the bytes set aside that measuring showed its prediction to be short of."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Protocol

from slimgrad.errors import BudgetError, PlanError
from slimgrad.measuring.profile import Profile
from slimgrad.planning.plan import Plan, plan
from slimgrad.types import Budget, format_bytes

_NARROWING = 0.9  # of the error that the measured one leaves


class Replan(Protocol):
    """``plan`` with everything given but the bytes to keep free below the budget."""

    def __call__(self, *, reserve_bytes: int) -> Plan:
        """The plan that leaves ``reserve_bytes`` of its budget free."""
        ...


def replan_of(made: Plan, profile: Profile) -> Replan:
    """Makes ``made`` again from the profile it came from; raises ``PlanError`` for one of another model."""
    if profile.fingerprint != made.fingerprint:
        raise PlanError(
            f"the profile has fingerprint {profile.fingerprint}, but the plan was made from one with "
            f"{made.fingerprint}: give the profile that the plan was made from"
        )
    budget = made.budget if Budget.parse(made.budget).is_min else made.budget_bytes
    again = functools.partial(
        plan,
        profile,
        budget,
        exactness=made.exactness,
        error=made.error,
        allow=made.allow,
        forbid=made.forbid,
        clip_grad_norm=made.clip_grad_norm,
        allow_compile=made.allow_compile,
        steps=made.num_steps,
    )
    return lambda *, reserve_bytes: replace(again(reserve_bytes=reserve_bytes), budget=made.budget)


def narrowed(planned: float, allowed: float, measured: float) -> float:
    """The error to plan for where a plan of error ``planned`` was ``measured`` above what is ``allowed``.

    The errors of single blocks add up otherwise than was thought: what is planned falls by the same factor.
    """
    return _NARROWING * planned * allowed / measured


def tightened(made: Plan, replan: Replan, measured_bytes: int, predicted_bytes: int) -> Plan:
    """``made`` solved again after a step of it was measured above its budget. Bytes.

    Kept free is what the prediction was short of, ``measured_bytes - predicted_bytes``; where nothing fits then,
    only as much more than before as the budget was passed by. ``tightened_bytes`` of the result says how much.

    Raises ``BudgetError`` where nothing fits either way.
    """
    over = measured_bytes - made.budget_bytes
    least = made.tightened_bytes + over
    short = max(measured_bytes - predicted_bytes, least)
    failure: BudgetError | None = None
    for reserve in sorted({short, least}, reverse=True):
        try:
            return replace(replan(reserve_bytes=reserve), tightened_bytes=reserve)
        except BudgetError as error:
            failure = error
    assert failure is not None
    smallest = failure.smallest_bytes + short
    raise BudgetError(
        f"a step was measured at {format_bytes(measured_bytes)}, {format_bytes(over)} above the budget "
        f"{made.budget}, where {format_bytes(predicted_bytes)} was predicted; no plan is that much leaner: with "
        f"what the prediction is short of, the smallest peak is about {format_bytes(smallest)} ({smallest} "
        "bytes). Give a larger budget or a smaller batch",
        smallest_bytes=smallest,
        by_rung={rung: peak + short for rung, peak in failure.by_rung.items()},
    ) from failure
