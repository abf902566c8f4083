"""Plans written by hand, for tests of what applies and verifies them: nothing is measured."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimgrad.measuring.blocks import cut
from slimgrad.measuring.profile import fingerprint
from slimgrad.planning.plan import Choice, Plan
from slimgrad.types import Exactness

ROOM = 1 << 30  # bytes: more than any of these models needs


def hand_plan(
    model: nn.Module,
    optimizer: Optimizer | None,
    *choices: Choice,
    clip_grad_norm: float | None = None,
) -> Plan:
    """A plan of ``choices`` for this model, with room for anything."""
    return Plan(
        fingerprint=fingerprint(model, optimizer),
        budget="1GiB",
        budget_bytes=ROOM,
        exactness=Exactness.EXACT,
        plain_peak_bytes=1000,
        plain_seconds=1.0,
        peak_bytes=1000,
        seconds=1.0,
        choices=choices,
        columns={},
        refusals={},
        clip_grad_norm=clip_grad_norm,
    )


def recomputed(model: nn.Module) -> tuple[Choice, ...]:
    """Recompute every block that the planner would cut."""
    return tuple(Choice(path, "recompute", {}) for path in cut(model))


def on_model(method: str, **fields: Any) -> Choice:
    """A method of the whole step."""
    return Choice("", method, fields)
