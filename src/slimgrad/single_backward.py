"""Gradients without a derivative of their own: asking for one meets an error and does not pass for zero."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimgrad.errors import UnsupportedError


def single_backward(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an autograd Function's ``backward(ctx, *gradients)``: it runs without a graph, and has no derivative."""

    def decorated(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *gradients: Tensor) -> Any:
            with torch.no_grad():
                found = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return found
            sources = [t for t in (*gradients, *ctx.saved_tensors) if t is not None]
            return without_second(name, found, [t for t in sources if t.requires_grad])

        return run

    return decorated


def without_second(
    name: str, grads: Sequence[Tensor | None], sources: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``grads`` as they are, tied to the ``sources`` that a double backward would have to pass.

    To be called at the end of a backward pass; does nothing where no graph is being made. ``name`` is what the
    error speaks of. (``once_differentiable`` would not do: it reports only where the incoming gradient requires one.)
    """
    if not torch.is_grad_enabled():
        return tuple(grads)
    links = [t for t in sources if t is not None]
    return tuple(None if g is None else _NoSecond.apply(name, g, *links) for g in grads)


class _NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, grad: Tensor, *links: Tensor) -> Tensor:
        ctx.name = name
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        raise UnsupportedError(
            f"the backward pass of {ctx.name} is written out by hand and has no derivative: expected one backward "
            "pass, found a double backward; use the plain computation for it"
        )
