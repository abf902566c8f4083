"""A step that is only tried: measured like all that follow the first ones, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from slimgrad.applying.first_steps import NUM_MEASURED
from slimgrad.applying.step import Step
from slimgrad.measuring.ledger import Ledger
from slimgrad.verifying.snapshot import Snapshot


def tried(
    step: Step,
    batch: Any,
    watching: Callable[[Ledger], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Ledger:
    """The ledger of the last of a few steps on ``batch``, run within ``watching``; everything is put back."""
    with step.suspended():
        snapshot = Snapshot(step.host.model, step.host.optimizer)
    counted, step.host.counts_steps = step.host.counts_steps, False
    try:
        for _ in range(NUM_MEASURED - 1):
            step(batch)
        with step.ledger(batch) as ledger, watching(ledger):
            step(batch)
    finally:
        step.host.counts_steps = counted
        restore(step, snapshot)
    return ledger


def restore(step: Step, snapshot: Snapshot) -> None:
    """Put a snapshot back under a step."""
    with step.suspended():
        snapshot.restore()
