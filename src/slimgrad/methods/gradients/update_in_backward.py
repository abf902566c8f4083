"""Updates each parameter as soon as its gradient is complete, and frees the gradient there and then.

Formula: theta_p <- U(theta_p, g_p, s_p) for each parameter p, inside backward; the same U, g and s as
    ``optimizer.step()`` after it, in another order.
Memory: gradients fall from all parameters' to those not yet complete: one layer's, and any tied weight's until
    its last use. The update's temporaries are one parameter's. Time: the same operations.
Exactness: bitwise, for optimizers that treat parameters one by one. That is shown by value for the user's own
    optimizer, not assumed from its name.
Limits: refused where the optimizer looks across parameters; with clipping by global norm, which needs every
    gradient before the first update (offload_gradients does that with gradients in files); where gradients are
    already kept in files.
References: Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources, section 3.1
    (fused update). *departs:* any separable optimizer with its own state, not SGD alone; no second backward for
    the norm. PyTorch's optimizer-in-backward tutorial uses the same hook.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from slimgrad.method import Block, Offer, Paper, Refusal, Scope, Undo, Update
from slimgrad.types import Column, Exactness, format_bytes


@dataclass(frozen=True)
class UpdateInBackward:
    """No hyperparameters."""

    column: ClassVar[Column] = Column.GRADIENTS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
        "Lv et al.",
        2024,
        "2306.09782",
    )

    def offer(self, block: Block) -> Offer | Refusal:
        """Gradients live only until their update."""
        record = block.model_record
        if not record.gradient_bytes:
            return Refusal("no optimizer: nothing is updated")
        if not record.separable:
            return Refusal("the optimizer does not treat parameters one by one")
        if record.clip_grad_norm is not None:
            return Refusal("clipping by global norm needs every gradient before the first update")
        if record.gradients_in_files:
            return Refusal("gradients are kept in files until backward is over")
        freed = format_bytes(record.gradient_bytes)
        return Offer(
            replace(record, update=Update.DURING), f"{freed} of gradients freed as they are used"
        )

    def attach(self, block: Block) -> Undo:
        """Take over completed gradients and the end of the step."""
        host = block.live

        def on_gradient(parameter: Tensor) -> None:
            host.update(parameter)
            parameter.grad = None

        before = host.on_gradient, host.finish
        host.on_gradient, host.finish = on_gradient, host.count_step

        def undo() -> None:
            host.on_gradient, host.finish = before

        return Undo(undo)
