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

from slimgrad import catalogue
from slimgrad.applying.gradient_hooks import watch_gradients
from slimgrad.batches import check_batch
from slimgrad.errors import FingerprintError, NonFiniteLoss, PlanError, UnsupportedError
from slimgrad.host import Host, LossFn
from slimgrad.measuring.ledger import Ledger
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.profile import fingerprint
from slimgrad.measuring.trace import checked_loss
from slimgrad.method import Block, Scope, Undo
from slimgrad.planning.plan import Plan


class Step:
    """One training step under a plan: ``loss = step(batch)`` is forward, backward and optimizer.

    Made by ``apply``. ``undo()`` puts the model and optimizer back; the step cannot be called afterwards.
    """

    def __init__(self, plan: Plan, host: Host, undo: Undo) -> None:
        self.plan, self.host = plan, host
        self._undo = undo
        self._undone = False
        self.num_steps = 0
        self.profile: Any = None  # what the plan was made from, where slim made it
        self.report: Any = None  # what verify found, where slim verified it

    def __call__(self, batch: Any) -> Tensor:
        """Run one step on ``batch``; the loss of the whole batch, a detached scalar.

        Raises ``NonFiniteLoss`` before any update where the loss is NaN or infinite (with micro-batches, and
        updates during backward, before the update that the part would make), ``LossError`` where it is not a
        scalar with a gradient, ``BatchError`` for an empty batch or one on another device.
        """
        if self._undone:
            raise PlanError("this step was undone: apply the plan again to go on with it")
        host = self.host
        check_batch(batch, host.device)
        self._clear_gradients()
        host.gradient_order = []
        try:
            loss = self._forward_backward(batch)
            host.finish()
        finally:
            host.in_last_share = True
            self._clear_gradients()
        self.num_steps += 1
        return loss

    def _forward_backward(self, batch: Any) -> Tensor:
        host = self.host
        shares = host.split(batch)
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
        self._undo()
        self._undone = True
        _applied.discard(self.host.model)

    @contextmanager
    def suspended(self) -> Generator[None]:
        """Plain training within the body: everything is put back, and attached again afterwards."""
        self._undo()
        try:
            yield
        finally:
            self._undo = attach_all(self.plan, self.host)

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
) -> Step:
    """Attach the plan's methods to ``model`` and ``optimizer`` in place.

    ``folder`` is where offloaded bytes go (default: the system's temporary folder). Raises
    ``FingerprintError`` where the plan was made for another model or optimizer, ``UnsupportedError`` for what
    is refused. If any method cannot be attached, those before it are undone.
    """
    found = fingerprint(model, optimizer)
    if found != plan.fingerprint:
        raise FingerprintError(
            f"this plan was made for a model and optimizer with fingerprint {plan.fingerprint}, but these have "
            f"{found}: shapes, module classes, frozen parameters or the optimizer's class differ. Measure and "
            "plan again for this model"
        )
    _refuse_wrapped(model)
    refuse_applied(model)
    clip = plan.clip_grad_norm if clip_grad_norm is None else clip_grad_norm
    if clip != plan.clip_grad_norm:
        raise PlanError(
            f"the plan was made with clip_grad_norm={plan.clip_grad_norm}, not {clip}: clipping changes what "
            "can be done during backward, so pass it to plan() as well"
        )
    host = Host(
        model,
        optimizer,
        loss_fn,
        clip_grad_norm=clip,
        folder=Path(folder) if folder is not None else None,
    )
    step = Step(plan, host, attach_all(plan, host))
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


def attach_all(plan: Plan, host: Host) -> Undo:
    """Attach every choice of the plan, in its order; if one cannot be attached, those before it are undone."""
    undo = Undo()
    try:
        undo.then(switch_off_cache(host.model))
        undo.then(watch_gradients(host))
        for choice in plan.choices:
            method = catalogue.get(choice.method, **choice.fields)
            scope = Scope.BLOCK if choice.path else Scope.MODEL
            undo.then(method.attach(Block(choice.path, scope, host=host)))
    except BaseException:
        undo()
        raise
    return undo


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers: Sequence[str] = ("DistributedDataParallel", "FullyShardedDataParallel")
    for module in model.modules():
        if type(module).__name__ in wrappers:
            raise UnsupportedError(
                f"the model is wrapped in {type(module).__name__}: gradients are exchanged between processes "
                "when they complete, which slimgrad does not plan for yet. Apply it to the inner module on "
                "one process"
            )
