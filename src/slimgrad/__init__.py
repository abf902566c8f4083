"""slimgrad: fit neural-network training into the memory you have."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimgrad.applying.step import Step, apply
    from slimgrad.errors import BudgetError, SlimgradError
    from slimgrad.measuring.ledger import Ledger
    from slimgrad.measuring.profile import Profile
    from slimgrad.planning.plan import Plan, plan
    from slimgrad.planning.profiling import measure
    from slimgrad.verifying.report import Report
    from slimgrad.verifying.slimming import slim
    from slimgrad.verifying.verify import verify

_ROOMS = {  # imported when first asked for: `slimgrad --help` does not wait for torch
    "Step": "applying.step",
    "apply": "applying.step",
    "BudgetError": "errors",
    "SlimgradError": "errors",
    "Ledger": "measuring.ledger",
    "Profile": "measuring.profile",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "measure": "planning.profiling",
    "Report": "verifying.report",
    "slim": "verifying.slimming",
    "verify": "verifying.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'slimgrad' has no attribute {name!r}")
    return getattr(import_module(f"slimgrad.{_ROOMS[name]}"), name)


__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "Ledger",
    "Plan",
    "Profile",
    "Report",
    "SlimgradError",
    "Step",
    "apply",
    "measure",
    "plan",
    "slim",
    "verify",
]
