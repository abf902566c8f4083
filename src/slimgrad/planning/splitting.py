"""How a batch larger than planned for may be split: the plan's own micro-batches, or those that it was measured with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slimgrad.batches import batch_shapes, format_shapes, is_within
from slimgrad.catalogue import find
from slimgrad.errors import PlanError
from slimgrad.measuring.profile import Profile
from slimgrad.methods.gradients.micro_batches import MicroBatches
from slimgrad.planning.offers import Allowed

if TYPE_CHECKING:
    from slimgrad.planning.plan import Plan

_NAME = "micro_batches"


def weighing_of(profile: Profile, allowed: Allowed) -> dict[str, Any] | None:
    """How measuring found that parts of a batch are weighed; None where parts are refused or not allowed."""
    if not allowed.permits(find(_NAME)):
        return None
    for variant in profile.variants:
        for name, fields in variant:
            if name == _NAME:
                return {field: value for field, value in fields if field != "num"}
    return None


def parts_of(plan: Plan) -> int:
    """Into how many parts the plan splits a batch."""
    return max((int(c.fields.get("num", 2)) for c in plan.choices if c.method == _NAME), default=1)


def splitter(num: int, weighing: Mapping[str, Any]) -> MicroBatches:
    """Micro-batches in ``num`` parts, weighed as measuring found."""
    return MicroBatches(num=num, **weighing)


def check_largest_batch(profile: Profile, largest_batch: Any) -> None:
    """Raise ``PlanError`` where the profile was measured for a batch that does not hold ``largest_batch``."""
    if largest_batch is None or not profile.batch_shapes:
        return
    found = batch_shapes(largest_batch)
    if not is_within(found, profile.batch_shapes):
        raise PlanError(
            f"largest_batch is {format_shapes(found)}, but the profile was measured for "
            f"{format_shapes(profile.batch_shapes)}: measure(model, optimizer, loss_fn, largest_batch) first (slim "
            "does so by itself)"
        )
