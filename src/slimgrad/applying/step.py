"""``apply``: attaches a plan's methods to the user's objects; the Step that runs one training step under it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.applying.attachment import Attachment
from slimgrad.applying.first_steps import FirstSteps, MeasuredStep, Tightening
from slimgrad.applying.guard import Guard, Split
from slimgrad.batches import check_batch
from slimgrad.errors import FingerprintError, NonFiniteLoss, PlanError, UnsupportedError
from slimgrad.host import Host, LossFn, Share
from slimgrad.measuring.ledger import Ledger
from slimgrad.measuring.profile import Profile, fingerprint
from slimgrad.measuring.trace import checked_loss
from slimgrad.planning.arguments import check_arguments
from slimgrad.planning.plan import Plan
from slimgrad.planning.tighten import Replan, replan_of


class Step:
    """One training step under a plan: ``loss = step(batch)`` is forward, backward and optimizer.

    Made by ``apply``. ``undo()`` puts the model and optimizer back; the step cannot be called afterwards.

    Where the step knows what its plan was made from, it measures its first three steps (``history``): on CUDA by the
    allocator's peak, else by the ledger, which takes some microseconds an operation. Where one passes the budget,
    the plan is made again with what the prediction was short of kept free, and exchanged before the call returns
    (``tightenings``; a ``PlanTightened`` warning). No update, optimizer state or random state is touched by that.
    """

    def __init__(self, plan: Plan, attachment: Attachment, guard: Guard) -> None:
        self.plan, self.host = plan, attachment.host
        self._attachment, self._guard = attachment, guard
        self._first_steps = FirstSteps()
        self._undone = False
        self.num_steps = 0
        self.profile: Any = None  # what the plan was made from, where slim made it
        self.report: Any = None  # what verify found, where slim verified it

    def __call__(self, batch: Any) -> Tensor:
        """Run one step on ``batch``; the loss of the whole batch, a detached scalar.

        Raises ``NonFiniteLoss`` before any update where the loss is NaN or infinite (with micro-batches, and
        updates during backward, before the update that the part would make), ``LossError`` where it is not a
        scalar with a gradient, ``BatchError`` for an empty batch or one on another device.

        Before anything is run, ``BatchTooLarge`` is raised for a batch larger than planned for that would pass the
        budget and cannot be split, and ``BudgetError`` where an earlier step was measured above the budget and
        no plan is leaner.
        """
        if self._undone:
            raise PlanError("this step was undone: apply the plan again to go on with it")
        check_batch(batch, self.host.device)
        self._first_steps.check()
        admission = self._guard.admit(batch, self.plan)
        split = self._guard.split(admission, self.plan)
        if not (self._first_steps.left and self.host.counts_steps):
            return self._run(batch, split)
        with self._first_steps.measuring(self, batch) as peak:
            loss = self._run(batch, split)
        predicted = admission.predicted_bytes or self.plan.peak_bytes
        budget = self.plan.budget_bytes
        self._first_steps.judge(self, MeasuredStep(self.num_steps, peak.bytes, predicted, budget))
        return loss

    @property
    def history(self) -> Sequence[MeasuredStep]:
        """The steps that were measured, the first first."""
        return tuple(self._first_steps.history)

    @property
    def tightenings(self) -> Sequence[Tightening]:
        """The plans that were made again because a step was measured above the budget."""
        return tuple(self._first_steps.tightenings)

    def measure_first(self, replan: Replan | None, tightenings: Sequence[Tightening] = ()) -> None:
        """Measure the next three steps, and make the plan again by ``replan`` where one passes the budget.

        None: measure none. ``tightenings`` are those before this step was made.
        """
        self._first_steps = FirstSteps(replan)
        self._first_steps.tightenings += tightenings

    def admit(self, batch: Any) -> None:
        """Find out now what the first step on a batch of these shapes would: whether it fits. Nothing is run.

        Raises ``BatchTooLarge`` as the step would.
        """
        check_batch(batch, self.host.device)
        self._guard.admit(batch, self.plan)

    def change_to(self, plan: Plan) -> None:
        """Exchange the plan, between two steps; what both have in common stays attached.

        Where a method cannot be attached, the old plan stays and the error is raised.
        """
        self._attachment.change_to(plan.choices)
        self.plan = plan
        self._guard.forget()

    def _run(self, batch: Any, split: Split) -> Tensor:
        host = self.host
        self._clear_gradients()
        host.gradient_order = []
        try:
            loss = self._forward_backward(split(batch))
            host.finish()
        finally:
            host.in_last_share = True
            self._clear_gradients()
        self.num_steps += 1
        return loss

    def _forward_backward(self, shares: Sequence[Share]) -> Tensor:
        host = self.host
        total: Tensor | None = None
        for index, share in enumerate(shares):
            host.in_last_share = index == len(shares) - 1
            loss = checked_loss(host.loss_fn(host.model, share.batch))
            weighted = loss if share.weight == 1 else loss * share.weight
            self._check_finite(loss)
            value = weighted.detach().clone()
            weighted.backward()
            total = value if total is None else total + value
            del loss, weighted
        assert total is not None
        return total

    def _check_finite(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteLoss(
                f"the loss of step {self.num_steps + 1} is {float(loss.detach())}: nothing was updated, parameters "
                "and optimizer state are those of the step before. Look at the batch, lower the learning "
                "rate, or skip the batch by catching NonFiniteLoss"
            )

    def _clear_gradients(self) -> None:
        for parameter in self.host.model.parameters():
            parameter.grad = None

    def undo(self) -> None:
        """Put back everything that the plan changed; gradients, state and ``state_dict`` are plain again."""
        self._attachment.undo()
        self._undone = True
        _applied.discard(self.host.model)

    @contextmanager
    def suspended(self) -> Generator[None]:
        """Plain training within the body: everything is put back, and attached again afterwards."""
        self._attachment.undo()
        try:
            yield
        finally:
            self._attachment.attach()

    def ledger(self, batch: Any = None) -> Ledger:
        """A ledger over this step's model and optimizer, its staging buffers named."""
        return Ledger(self.host.model, self.host.optimizer, inputs=batch, owned=self.host.owned)

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undone else f"{self.num_steps} steps taken"
        return f"<slimgrad.Step: {len(self.plan.choices)} methods applied, {state}>"


def apply(
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer | None,
    loss_fn: LossFn,
    *,
    clip_grad_norm: float | None = None,
    folder: str | Path | None = None,
    profile: Profile | None = None,
    on_larger: str = "split",
    largest_batch: Any = None,
) -> Step:
    """Attach the plan's methods to ``model`` and ``optimizer`` in place.

    ``folder`` is where offloaded bytes go (default: the system's temporary folder). With ``profile``, the one that
    the plan was made from, the first three steps are measured, and the plan is tightened where they pass the budget.

    ``on_larger`` says what is done with a batch longer in some dimension than the one planned for, if the step is
    predicted to pass the budget with it. ``"split"``: it is run in the fewest micro-batches that fit, where these
    give the update of the whole; else as ``"raise"``: ``BatchTooLarge``, before anything is run. ``"run"``: no
    batch is looked at. A prediction takes one trace on fake tensors (tenths of a second to some seconds), once for
    each shape that is not within the planned one. ``largest_batch`` is looked at before the first step.

    Raises ``FingerprintError`` where the plan was made for another model or optimizer, ``UnsupportedError`` for
    what is refused, ``BatchTooLarge`` for a ``largest_batch`` that does not fit. If any method cannot be attached,
    those before it are undone.
    """
    check_arguments(model, optimizer, loss_fn)
    _refuse_another(plan, model, optimizer)
    _refuse_wrapped(model)
    refuse_applied(model)
    clip = plan.clip_grad_norm if clip_grad_norm is None else clip_grad_norm
    if clip != plan.clip_grad_norm:
        raise PlanError(
            f"the plan was made with clip_grad_norm={plan.clip_grad_norm}, not {clip}: clipping changes what "
            "can be done during backward, so pass it to plan() as well"
        )
    parent = Path(folder) if folder is not None else None
    host = Host(model, optimizer, loss_fn, clip_grad_norm=clip, folder=parent)
    replan = None if profile is None else replan_of(plan, profile)
    attachment = Attachment(plan.choices, host)
    try:
        step = Step(plan, attachment, Guard(attachment, on_larger, profile))
        step.profile = profile
        if replan is not None:
            step.measure_first(replan)
        if largest_batch is not None:
            step.admit(largest_batch)
    except BaseException:
        attachment.undo()
        raise
    _applied.add(model)
    return step


_applied: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def refuse_applied(model: nn.Module) -> None:
    """Raise ``PlanError`` where a plan is applied to ``model`` already: two would attach to each other."""
    if model in _applied:
        raise PlanError(
            "a plan is applied to this model already: call undo() on its step first (it puts back everything "
            "that was changed), then plan again"
        )


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers: Sequence[str] = ("DistributedDataParallel", "FullyShardedDataParallel")
    for module in model.modules():
        if type(module).__name__ in wrappers:
            raise UnsupportedError(
                f"the model is wrapped in {type(module).__name__}: gradients are exchanged between processes "
                "when they complete, which slimgrad does not plan for yet. Apply it to the inner module on "
                "one process"
            )


def _refuse_another(plan: Plan, model: nn.Module, optimizer: Optimizer | None) -> None:
    found = fingerprint(model, optimizer)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"this plan was made for a model and optimizer with fingerprint {plan.fingerprint}, but these have "
            f"{found}: shapes, module classes, frozen parameters or the optimizer's class differ. Measure and "
            "plan again for this model"
        )
