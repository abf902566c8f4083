"""``slim``: measure, plan, apply and verify in one call, and tighten the plan where measuring shows it short."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimgrad.applying.step import Step, apply, refuse_applied
from slimgrad.errors import VerificationError
from slimgrad.host import LossFn
from slimgrad.planning.plan import plan
from slimgrad.planning.profiling import measure
from slimgrad.types import Budget, BudgetLike, Exactness, format_bytes
from slimgrad.verifying.report import Report
from slimgrad.verifying.verify import verify as verify_step

_TIGHTENINGS = 3


def slim(
    model: nn.Module,
    optimizer: Optimizer | None,
    loss_fn: LossFn,
    batch: Any,
    *,
    budget: BudgetLike,
    exactness: Exactness | str = Exactness.EXACT,
    error: float | None = None,
    allow: Sequence[str] = (),
    largest_batch: Any = None,
    clip_grad_norm: float | None = None,
    verify: bool = True,
    folder: str | Path | None = None,
    allow_compile: bool | None = None,
    steps: int | None = None,
) -> Step:
    """Fit one training step of ``model`` into ``budget``: measure, plan, apply, verify.

    Returns a ``Step``: ``loss = step(batch)`` is forward, backward and optimizer. ``largest_batch`` is planned
    for instead of ``batch``; ``folder`` is where offloaded bytes go. With ``verify`` the step's peak is measured
    and its gradients are compared with plain training's before it is returned (``step.report``); where the peak
    is above the budget, the plan is tightened by the difference and made again. ``allow_compile`` says whether
    blocks may be compiled (None: where that is found to pay off within the run's ``steps``, None: 1000).

    Raises ``BudgetError`` where nothing allowed fits, ``VerificationError`` (everything undone) where the
    planned step does not do what plain training does, and what ``measure``, ``plan`` and ``apply`` raise.
    """
    asked = Budget.parse(budget)
    refuse_applied(model)
    sample = batch if largest_batch is None else largest_batch
    compiles = False if exactness == Exactness.BITWISE else allow_compile
    run: dict[str, Any] = {"allow_compile": compiles, "steps": steps}
    how: dict[str, Any] = {"exactness": exactness, "error": error, "allow": allow}
    how["clip_grad_norm"] = clip_grad_norm
    profile = measure(model, optimizer, loss_fn, sample, limit_bytes=asked.bytes, **run)
    reserve, over, report = 0, 0, None
    for _ in range(_TIGHTENINGS):
        made = plan(profile, asked, reserve_bytes=reserve, **how, **run)
        made = replace(made, tightened_bytes=reserve)
        step = apply(made, model, optimizer, loss_fn, clip_grad_norm=clip_grad_norm, folder=folder)
        step.profile = profile
        if not verify:
            return step
        report = _verified(step, sample)
        over = report.peak_bytes - made.budget_bytes
        if over <= 0 or asked.is_min:
            step.report = report
            step.num_steps = 0  # those of the verification were put back
            return step
        step.undo()
        reserve += over
    raise VerificationError(
        f"the measured peak stays {format_bytes(over)} above the budget after {_TIGHTENINGS} tightened plans; "
        "everything was undone. Give a larger budget",
        report=report,
    )


def _verified(step: Step, sample: Any) -> Report:
    try:
        report = verify_step(step, sample)
    except BaseException:
        step.undo()
        raise
    if not report.passed:
        step.undo()
        failed = ", ".join(name for name, ok in report.checks.items() if not ok)
        raise VerificationError(
            f"the planned step differs from plain training in: {failed}. Everything was undone.\n{report}\n"
            "Something in the forward pass changes from run to run (a counter, an own random generator, a "
            "global): exclude the block's method, or make the forward pass repeatable",
            report=report,
        )
    return report
