"""Gradients without a derivative of their own: asking for one must not pass for zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import UnsupportedError


class NoSecond(torch.autograd.Function):
    """``NoSecond.apply(gradient, *links)``: the gradient; a derivative of it in any of ``links`` is an error.

    ``once_differentiable`` would not do: it reports only where the incoming gradient requires one.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *links: Tensor) -> Tensor:  # noqa: D102 - torch's own name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        raise UnsupportedError(
            "this loss is differentiated by hand: expected no derivative of its gradient, found a double backward; "
            "use the plain loss for it"
        )


def once(
    grads: Sequence[Tensor | None], links: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients, linked to what they depend on where a graph of them is being made."""
    if not torch.is_grad_enabled():
        return tuple(grads)
    tied = [t for t in links if t is not None and t.requires_grad]
    return tuple(None if g is None else NoSecond.apply(g, *tied) for g in grads)  # type: ignore[misc]
