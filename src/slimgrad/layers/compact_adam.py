"""Adam whose moments live in the reduced space of ``compact``'s weights; of other parameters, AdamW.

Shapes: D inputs, O outputs, R the rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.layers.compaction import Compaction, compaction_of


class CompactAdam(torch.optim.Optimizer):
    """For a model changed by ``compact``: W -= lr scale N P^T, N Adam's normalized moment of the small gradient.

    ``gap`` is after how many updates of a weight its projection is drawn anew; moments are kept then. ``scale``
    is for weights in a reduced space alone; weight decay is decoupled, for all. Clear gradients by this optimizer's
    ``zero_grad``: the model's does not know the small ones. Raises MethodError for values out of bounds; ``step`` raises
    UnsupportedError where a weight in a reduced space has a gradient of its own, which would be lost.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        scale: float = 1.0,
        gap: int = 200,
    ) -> None:
        is_valid = lr >= 0 and eps >= 0 and weight_decay >= 0 and scale > 0 and gap >= 1
        if not is_valid or not all(0 <= b < 1 for b in betas):
            raise MethodError(
                f"expected lr, eps and weight_decay of 0 or more, scale above 0, gap of 1 or more and betas in [0, 1), "
                f"found {lr}, {eps}, {weight_decay}, {scale}, {gap} and {betas}"
            )
        keywords = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**keywords, "scale": scale, "gap": gap})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of small gradients too."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for parameter in group["params"]:
                compaction = compaction_of(parameter)
                if compaction is not None and compaction.gradient is not None:
                    compaction.gradient = (
                        None if set_to_none else torch.zeros_like(compaction.gradient)
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Projections become those that the moments were made under."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                compaction = compaction_of(parameter)
                if compaction is not None and parameter in self.state:
                    compaction.num_refreshes = self.state[parameter]["step"] // group["gap"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of each parameter that has a gradient, small or whole."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                compaction = compaction_of(parameter)
                grad = (
                    parameter.grad if compaction is None else _small_gradient(parameter, compaction)
                )
                if grad is not None:
                    self._update(parameter, grad, compaction, group)
        return loss

    def _update(
        self, parameter: Tensor, grad: Tensor, compaction: Compaction | None, group: dict[str, Any]
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        state["step"] += 1
        direction = _normalized(state, grad, group)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        if compaction is None:
            parameter.add_(direction, alpha=-group["lr"])
            return
        projection_DR = compaction.projection(direction)
        parameter.addmm_(direction, projection_DR.T, alpha=-group["lr"] * group["scale"])
        compaction.num_refreshes = state["step"] // group["gap"]


def _small_gradient(parameter: Tensor, compaction: Compaction) -> Tensor | None:
    if parameter.grad is not None:
        raise UnsupportedError(
            f"expected a weight of {tuple(parameter.shape)} to be read by its layer's forward alone, found a gradient of its own: "
            "name other layers to compact, and clear gradients that are older"
        )
    return compaction.gradient


def _normalized(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
    """Adam's moments brought up to date, and the first over the root of the second, both without their bias."""
    (first, second), mean, square = group["betas"], state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(grad, 1 - first)
    square.mul_(second).addcmul_(grad, grad, value=1 - second)
    root = square.sqrt().mul_((1 - second ** state["step"]) ** -0.5).add_(group["eps"])
    return torch.div(mean, root, out=root).div_(1 - first ** state["step"])
