"""Layers that save for backward only what the tensors that train need.

Eager autograd prunes most by itself: a linear layer with a frozen weight saves no input. Convolutions and norms have
one backward for all their gradients, and save the input whether it is asked for or not. What is here takes their place
on the instance; forward runs the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.method import Undo


class _FrozenConvolution(torch.autograd.Function):
    """A convolution whose weight does not train: the input gradient needs the input's shape alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.options = x.shape, options
        ctx.bias_sizes = None if bias is None else [bias.shape[0]]
        stride, padding, dilation, groups = options
        none = [0] * len(stride)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (weight,) = grads, ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        shape_only = g.new_empty(()).expand(ctx.shape)
        wanted = [ctx.needs_input_grad[0], False, ctx.needs_input_grad[2]]
        none = [0] * len(stride)
        dx, _, dbias = torch.ops.aten.convolution_backward(
            g, shape_only, weight, ctx.bias_sizes, stride, padding, dilation, False, none, groups, wanted
        )  # fmt: skip
        return dx, None, dbias, None, None, None, None


class _BiasOfNorm(torch.autograd.Function):
    """A norm of which nothing but the bias needs a gradient: that needs nothing saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.shape = bias.shape
        return norm(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,) = grads
        return None, g.sum_to_size(ctx.shape), None


class _FrozenStatistics(torch.autograd.Function):
    """Batch norm by running statistics whose weight does not train: linear in the input, which is not needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> Tensor:
        assert norm.running_var is not None
        scale = torch.rsqrt(norm.running_var + norm.eps)
        ctx.save_for_backward(scale if norm.weight is None else scale * norm.weight)  # pyright: ignore[reportUnnecessaryComparison]
        return _plain(norm, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (g,), (scale,) = grads, ctx.saved_tensors
        over = [0, *range(2, g.dim())]
        dx = g * scale.view(1, -1, *[1] * (g.dim() - 2)) if ctx.needs_input_grad[0] else None
        return dx, g.sum(over) if ctx.needs_input_grad[1] else None, None


def _plain(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


def _trains(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def prune(model: nn.Module) -> Undo:
    """Put lean layers in the place of convolutions and norms whose weight is frozen; on the instances."""
    undo = Undo()
    for module in model.modules():
        if "forward" in vars(module) or _trains(getattr(module, "weight", None)):
            continue
        lean = _lean_forward(module)
        if lean is not None:
            module.forward = lean
            undo.then(lambda module=module: vars(module).pop("forward", None))
    return undo


def _lean_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        conv: Any = module
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return None
        return lambda x: _convolve(conv, x)
    if type(module) is nn.LayerNorm:
        return lambda x: _layer_norm(module, x)
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return lambda x: _batch_norm(module, x)  # pyright: ignore[reportArgumentType]
    return None


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if x.dim() != conv.weight.dim() or torch.is_autocast_enabled(x.device.type):
        return _plain(conv, x)
    options = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y: Any = _FrozenConvolution.apply(x, conv.weight, conv.bias, *options)
    return y


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    if x.requires_grad or not _trains(norm.bias) or torch.is_autocast_enabled(x.device.type):
        return _plain(norm, x)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    y: Any = _BiasOfNorm.apply(
        x, bias, lambda x: functional.layer_norm(x, shape, weight, bias, eps)
    )
    return y


def _batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    if norm.training or norm.running_var is None or torch.is_autocast_enabled(x.device.type):
        return _plain(norm, x)
    y: Any = _FrozenStatistics.apply(x, norm.bias, norm)
    return y
