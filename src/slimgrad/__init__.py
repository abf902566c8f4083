"""slimgrad: fit neural-network training into the memory you have."""

from slimgrad.applying.step import Step, apply
from slimgrad.errors import BudgetError, SlimgradError
from slimgrad.measuring.ledger import Ledger
from slimgrad.measuring.profile import Profile
from slimgrad.planning.plan import Plan, plan
from slimgrad.planning.profiling import measure
from slimgrad.verifying.report import Report
from slimgrad.verifying.slimming import slim
from slimgrad.verifying.verify import verify

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
