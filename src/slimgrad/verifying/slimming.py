"""``slim``: measure, plan, apply and verify in one call, and tighten the plan where measuring shows it short."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimgrad import catalogue
from slimgrad.applying.first_steps import MeasuredStep, Tightening
from slimgrad.applying.step import Step, apply, refuse_applied
from slimgrad.errors import BudgetError, NonFiniteLoss, VerificationError
from slimgrad.host import LossFn
from slimgrad.planning.arguments import check_arguments
from slimgrad.planning.plan import Plan, allowed_by, needs_sensitivity, plan
from slimgrad.planning.profiling import measure
from slimgrad.planning.tighten import narrowed, tightened
from slimgrad.types import Budget, BudgetLike, Exactness, format_bytes
from slimgrad.verifying.report import Report
from slimgrad.verifying.sample_loss import refuse_non_finite
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
    forbid: Sequence[str] = (),
    largest_batch: Any = None,
    clip_grad_norm: float | None = None,
    verify: bool = True,
    folder: str | Path | None = None,
    on_larger: str = "split",
    allow_compile: bool | None = None,
    steps: int | None = None,
) -> Step:
    """Fit one training step of ``model`` into ``budget``: measure, plan, apply, verify.

    ``exactness`` is the loosest rung allowed; methods in ``forbid`` are left out. On ``unbiased`` and ``approximate``
    each code's error of the gradient is measured first, and ``error`` (default 0.05) bounds that of the whole (relative L2).

    Returns a ``Step``: ``loss = step(batch)`` is forward, backward and optimizer. ``largest_batch`` is measured,
    planned for and verified instead of ``batch``; ``on_larger``: see ``apply``. ``folder`` is where offloaded bytes go.
    With ``verify`` the step's peak is measured and its gradients are compared with plain training's before it is
    returned (``step.report``); where the peak is above the budget, the plan is made again with what the prediction was
    short of kept free, and where an exact method rounds more than is allowed on this model, without it. Without, the
    step measures its own first three calls, and tightens its plan between them (``step.history``,
    ``step.tightenings``). ``allow_compile``: may blocks be compiled (None: where it pays off within ``steps``, 1000)?

    Raises ``BudgetError`` where nothing allowed fits, ``NonFiniteLoss`` where the loss of the sample batch is NaN or
    infinite, ``VerificationError`` (everything undone) where the planned step does not do what plain training
    does, ``ArgumentError`` for arguments in each other's place, and what ``measure``, ``plan`` and ``apply`` raise.
    """
    check_arguments(model, optimizer, loss_fn)
    asked = Budget.parse(budget)
    allowed_by(exactness, error, allow, clip_grad_norm, allow_compile, steps, forbid)
    refuse_applied(model)
    sample = batch if largest_batch is None else largest_batch
    compiles = False if exactness == Exactness.BITWISE else allow_compile
    run: dict[str, Any] = {"allow_compile": compiles, "steps": steps}
    kept: dict[str, Any] = {**run, "sensitivity": needs_sensitivity(exactness, error)}
    profile = measure(model, optimizer, loss_fn, sample, limit_bytes=asked.bytes, **kept)
    run |= {"exactness": exactness, "error": error, "allow": allow, "forbid": forbid}
    replan = functools.partial(plan, profile, asked, clip_grad_norm=clip_grad_norm, **run)
    users: dict[str, Any] = {"model": model, "optimizer": optimizer, "loss_fn": loss_fn}
    users |= {"clip_grad_norm": clip_grad_norm, "folder": folder, "on_larger": on_larger}
    attached = functools.partial(apply, profile=profile, **users)
    try:
        made = replan(reserve_bytes=0)
    except BudgetError:
        refuse_non_finite(model, loss_fn, sample)  # parts of such a batch cannot be weighed
        raise
    if verify:
        return _tightened_until_verified(made, replan, attached, sample)
    step = attached(made)
    step.measure_first(replan)
    return step


@dataclass
class _Planner:
    """Makes the plan again, with more kept free, for a smaller error, or without methods that rounded too much."""

    planned: functools.partial[Plan]
    allowed: float | None = None  # of the gradient's error
    error: float | None = None  # to plan for, where that is less than what is allowed
    rounding: dict[str, str] = field(default_factory=dict)  # method -> what was measured

    def __call__(self, *, reserve_bytes: int) -> Plan:
        forbid = (*self.planned.keywords["forbid"], *self.rounding)
        error = {} if self.error is None else {"error": self.error}
        made = self.planned(reserve_bytes=reserve_bytes, forbid=forbid, **error)
        allowed = made.error if self.error is None else self.allowed
        return replace(made, error=allowed, refusals={**made.refusals, **self.rounding})

    def learns(self, made: Plan, failure: VerificationError) -> bool:
        """Whether another plan may pass where ``made`` failed."""
        error = _narrower(made, failure.report)
        if error is not None:
            self.allowed, self.error = made.error, error
            return True
        suspect = _suspect(made, failure.report)
        if suspect is not None:
            self.rounding[suspect[0]] = suspect[1]
        return suspect is not None


def _tightened_until_verified(
    made: Plan, planned: functools.partial[Plan], applied: Callable[[Plan], Step], sample: Any
) -> Step:
    told: list[Tightening] = []
    replan = _Planner(planned)
    while True:
        step = applied(made)
        try:
            report = _verified(step, sample)
        except VerificationError as failure:
            if not replan.learns(made, failure):
                raise
            try:
                made = replan(reserve_bytes=made.tightened_bytes)
            except BudgetError:
                raise failure from None
            continue
        is_min = Budget.parse(made.budget).is_min
        over = report.peak_bytes - made.budget_bytes
        if over > 0 and is_min:  # the smallest peak is what was measured
            report.budget_bytes = report.peak_bytes
            step.plan = replace(made, budget_bytes=report.peak_bytes)
        if over <= 0 or is_min:
            step.report = report
            step.num_steps = 0  # those of the verification were put back
            # the ledger has seen this step; the allocator's own peak on CUDA may be higher
            step.measure_first(replan if step.host.device.type == "cuda" else None, told)
            return step
        step.undo()
        if len(told) == _TIGHTENINGS:
            raise VerificationError(
                f"the measured peak stays {format_bytes(over)} above the budget after {_TIGHTENINGS} tightened "
                "plans; everything was undone. Give a larger budget",
                report=report,
            )
        before, seen = made, MeasuredStep(0, report.peak_bytes, made.peak_bytes, made.budget_bytes)
        made = tightened(made, replan, report.peak_bytes, made.peak_bytes)
        told.append(Tightening(seen, made.tightened_bytes, before, made))


def _narrower(made: Plan, report: object) -> float | None:
    """The error to plan for where the gradient's was measured above what is allowed; None where that is not what failed."""
    if made.error is None or not isinstance(report, Report) or not made.predicted_error:
        return None
    measured = report.gradient_error or 0.0
    if _failed(report) != ["gradient"] or not made.error < measured < math.inf:
        return None
    return narrowed(made.predicted_error, made.error, measured)


def _suspect(made: Plan, report: object) -> tuple[str, str] | None:
    """A method of rung ``exact`` that may have rounded too much, and what was measured; None where there is none."""
    if not isinstance(report, Report) or _failed(report) != ["gradient"]:
        return None
    for choice in made.choices:
        if catalogue.get(choice.method).exactness is Exactness.EXACT:
            measured = report.float64_gradient_error or report.gradient_error or 0.0
            own = report.plain_gradient_error
            beside = "" if own is None else f", plain training's own is {own:.1e}"
            return choice.method, f"with it the gradient's error was {measured:.1e} here{beside}"
    return None


def _verified(step: Step, sample: Any) -> Report:
    try:
        report = verify_step(step, sample)
    except NonFiniteLoss as error:
        step.undo()
        refuse_non_finite(step.host.model, step.host.loss_fn, sample)
        raise NonFiniteLoss(
            "the loss of the sample batch is finite, but its gradient is not: after updates by it the loss is NaN "
            "or infinite. No plan can be verified on this batch, and everything was undone. Lower the learning "
            f"rate, or look at the batch and at the model's weights ({error})"
        ) from error
    except BaseException:
        step.undo()
        raise
    if report.non_finite:
        step.undo()
        raise NonFiniteLoss(
            "the gradient of the sample batch is NaN or infinite in plain training too "
            f"({', '.join(report.non_finite[:3])}), so no plan can be verified on it; everything was undone"
        )
    if not report.passed:
        step.undo()
        failed = ", ".join(_failed(report))
        raise VerificationError(
            f"the planned step differs from plain training in: {failed}. Everything was undone.\n{report}\n"
            "Usual causes: something in the forward pass changes from run to run (a counter, an own random "
            "generator, a global), or kernels round otherwise on this model: make the forward pass repeatable, ask "
            f"for exactness='bitwise', or leave methods out with forbid=[...] (here: {_named(step.plan)})",
            report=report,
        )
    return report


def _failed(report: Report) -> list[str]:
    return [name for name, passed in report.checks.items() if not passed]


def _named(made: Plan) -> str:
    return ", ".join(dict.fromkeys(choice.method for choice in made.choices))
