"""Backward in two stages: input gradients at once, weight gradients of linear layers and convolutions when asked for.

Formula: stage one dx = W^T g, and (x, g) is put into a queue; stage two dW = g x^T for each pair, in the order of the queue
Memory: until stage two the queue holds each layer's input and output gradient, which plain backward frees
    (``held_bytes``; a gradient of the weight is smaller where rows are many). Where rows are few and gradients are
    used up as they come, the peak can fall: weight gradients no longer come while all activations are there. ``peaks``
    tells both peaks of a step. Time: the same operations; a pipeline's idle time goes to stage two
    (``slimgrad.layers.pipeline_schedule``).
Exactness: bitwise: the operations of plain backward on the same values, for inputs with rows one after the other.
Limits: ``nn.Linear`` and ``nn.Conv1d`` to ``3d`` with weights of their own; weights that two modules share, biases, norms
    and embeddings have their gradients in stage one. Under autocast, under recomputation and in second derivatives,
    layers do as before or raise; ``flush`` has to run before gradients are read or clipped.
References: Rae, Lee and Richings (2024), section 3 (backward-p1 and backward-p2). *departs:* stage two runs pair by pair,
    micro-batches are not concatenated, so that the sums keep their order; hooks on complete gradients run in stage two.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.errors import ModelError
from slimgrad.host import Batch, LossFn
from slimgrad.measuring.fake import faked
from slimgrad.measuring.trace import checked_loss
from slimgrad.measuring.tracker import Tracker
from slimgrad.method import Paper, Undo, component
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@component(
    Column.ACTIVATIONS,
    Exactness.BITWISE,
    Paper(
        "2BP: 2-Stage Backpropagation",
        "Christopher Rae, Joseph K. L. Lee, James Richings",
        2024,
        "2405.18047",
    ),
)
class TwoStageBackward:
    """``stages = TwoStageBackward(model)``; after ``loss.backward()`` comes ``stages.flush()``, then the optimizer.

    ``undo()`` makes the layers plain again. Raises ModelError where the model has no layer to split.
    """

    def __init__(self, model: nn.Module) -> None:
        self._queue: collections.deque[_Owed] = collections.deque()
        self._owed: collections.Counter[int] = collections.Counter()
        self._anchor = torch.zeros(0, requires_grad=True)  # what keeps the first layer in the graph
        self.undo = Undo()
        owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values())
        self.layers = [
            m
            for m in model.modules()
            if type(m) in _KINDS and "forward" not in vars(m) and _is_split(m, owners)
        ]
        if not self.layers:
            raise ModelError("expected linear layers or convolutions with weights of their own")
        for layer in self.layers:
            layer.forward = self._forward_of(layer)
            self.undo.then(lambda layer=layer: vars(layer).pop("forward", None))

    def _forward_of(self, layer: Any) -> Callable[[Tensor], Tensor]:
        split: Any = _TwoStageLinear if type(layer) is nn.Linear else _TwoStageConvolution
        num_dims = 2 if type(layer) is nn.Linear else layer.weight.dim()

        def forward(x: Tensor) -> Tensor:
            plain = not layer.weight.requires_grad or not torch.is_grad_enabled()
            if plain or x.dim() < num_dims or torch.is_autocast_enabled(x.device.type):
                return type(layer).forward(layer, x)
            # the weight itself would have its hooks run in stage one, without a gradient
            return split.apply(x, self._anchor, layer.bias, layer, self._owe)

        return forward

    def _owe(self, weight: Tensor, x: Tensor, g: Tensor, gradient: Callable[..., Tensor]) -> None:
        self._queue.append(_Owed(weight, x, g, gradient))
        self._owed[id(weight)] += 1

    @property
    def num_pending(self) -> int:
        """Weight gradients that are owed."""
        return len(self._queue)

    @property
    def held_bytes(self) -> int:
        """Bytes that the queue holds; each storage once."""
        tensors = (t for owed in self._queue for t in (owed.x, owed.g))
        return sum(
            {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values()
        )

    @torch.no_grad()
    def flush(self, at_most: int | None = None) -> int:
        """Compute owed weight gradients, the oldest first, and add them to ``.grad``; how many were computed.

        A weight's hooks on its complete gradient run with its last one.
        """
        num_done = 0
        while self._queue and (at_most is None or num_done < at_most):
            weight = self._pay(self._queue.popleft())
            num_done += 1
            self._owed[id(weight)] -= 1
            if not self._owed[id(weight)]:
                hooks: Any = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
                for hook in list(hooks.values()):
                    hook(weight)
        return num_done

    @staticmethod
    def _pay(owed: _Owed) -> Tensor:
        gradient = owed.gradient(owed.x, owed.g)
        weight = owed.weight
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        return weight


class _Owed:
    """A weight's gradient that is put off."""

    __slots__ = ("g", "gradient", "weight", "x")

    def __init__(
        self, weight: Tensor, x: Tensor, g: Tensor, gradient: Callable[..., Tensor]
    ) -> None:
        self.weight, self.x, self.g, self.gradient = weight, x, g, gradient


def _is_split(layer: Any, owners: collections.Counter[int]) -> bool:
    if owners[id(layer.weight)] > 1:
        return False
    if type(layer) is nn.Linear:
        return True
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


class _TwoStageLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, _: Tensor, bias: Tensor | None, linear: Any, owe: Any
    ) -> Tensor:
        ctx.save_for_backward(x, linear.weight)
        ctx.weight, ctx.owe = linear.weight, owe
        return nn.functional.linear(x, linear.weight, bias)

    @staticmethod
    @single_backward("TwoStageBackward")
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, weight) = grads, ctx.saved_tensors
        g_NO = g.reshape(-1, g.shape[-1])
        ctx.owe(ctx.weight, x.detach().reshape(-1, x.shape[-1]), g_NO.detach(), _linear_gradient)
        dx = torch.mm(g_NO, weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, g_NO.sum(0) if ctx.needs_input_grad[2] else None, None, None


def _linear_gradient(x_NI: Tensor, g_NO: Tensor) -> Tensor:
    return torch.mm(g_NO.t(), x_NI)


class _TwoStageConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, bias: Tensor | None, conv: Any, owe: Any) -> Tensor:
        weight = conv.weight
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.owe, ctx.bias_sizes = weight, owe, None if bias is None else [bias.shape[0]]
        none = [0] * len(conv.stride)
        ctx.options = (conv.stride, conv.padding, conv.dilation, False, none, conv.groups)
        return torch.convolution(x, weight, bias, *ctx.options)

    @staticmethod
    @single_backward("TwoStageBackward")
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (x, weight), options = grads, ctx.saved_tensors, ctx.options
        both = torch.ops.aten.convolution_backward
        shape = weight.shape

        def gradient(x: Tensor, g: Tensor) -> Tensor:
            shape_only = g.new_empty(()).expand(shape)
            return both(g, x, shape_only, None, *options, [False, True, False])[1]

        ctx.owe(ctx.weight, x.detach(), g.detach(), gradient)
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        dx, _, dbias = both(g, x, weight, ctx.bias_sizes, *options, wanted)
        return dx, None, dbias, None, None


def peaks(
    model: nn.Module, loss_fn: LossFn, batch: Batch, *, gradients_stay: bool = True
) -> dict[str, int]:
    """Peak bytes of forward and backward with weight gradients at once (``"now"``) and in a second stage (``"later"``).

    Traced on fake tensors. ``gradients_stay=False``: each gradient is used up and freed as it completes.
    """
    found = {"now": _peak(model, loss_fn, batch, None, gradients_stay)}
    stages = TwoStageBackward(model)
    try:
        found["later"] = _peak(model, loss_fn, batch, stages, gradients_stay)
    finally:
        stages.undo()
    return found


def _peak(
    model: nn.Module, loss_fn: LossFn, batch: Batch, stages: TwoStageBackward | None, stay: bool
) -> int:
    def free(parameter: Tensor) -> None:
        parameter.grad = None

    with faked(model, batch) as (fake,):
        if not stay:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(free)
        with Tracker(model, inputs=fake) as tracker:
            checked_loss(loss_fn(model, fake)).backward()
            if stages is not None:
                stages.flush()
    return tracker.peak_bytes
