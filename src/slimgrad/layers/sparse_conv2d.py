"""A 2-d convolution with unstructured sparse weights, as products of the nonzeros with patches of the image.

Formula: y_n = W X_n, X_n the columns of the patches of image n; dx_n = fold(W^T g_n); dw_k = sum_n g_n[row k] . X_n[col k]
    for each nonzero k, and for nothing else
Memory: weights are one value and 12 bytes of indices a nonzero; gradient and optimizer state have one entry a
    nonzero. Saved for backward: the input, as in a dense layer. Temporaries: the patches of one image (kernel height x
    width times the image where strides are 1; a 1x1 kernel of stride 1 needs none), and a copy of the values. Time: what
    follows the nonzeros comes on top of making the patches, which does not: with few channels and large images no
    sparsity pays. ``break_even_sparsity`` tells on your machine.
Exactness: exact: sums over nonzeros, in another order than the dense convolution.
Limits: on the CPU, in float32 or float64 (autocast runs it in float32); no groups, padding with zeros that is the same
    on both sides: anything else raises ``UnsupportedError``; which weights are nonzero stays as it was made; no second
    derivatives.
References: Nikdan et al. (2023), section 3 (algorithm for convolutions). *departs:* patches of one image at a time and
    the sparse products of a linear layer, in place of loops over the nonzeros inside the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import UnsupportedError
from slimgrad.layers.csr_pattern import (
    COLUMNS,
    CsrPattern,
    blocks,
    check_input,
    checked_mask,
    times,
)
from slimgrad.layers.sparse_linear import PAPER, CsrWeight
from slimgrad.method import component
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness


@dataclass(frozen=True)
class _Geometry:
    """What a convolution's patches are; pairs of height and width."""

    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    def output(self, size: tuple[int, int]) -> tuple[int, int]:
        height, width = (
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, d, p, s in zip(
                size, self.kernel, self.dilation, self.padding, self.stride, strict=True
            )
        )
        return height, width

    def patches(self, x_CHW: Tensor) -> Tensor:
        """One image's patches as columns."""
        if self.is_pointwise:
            return x_CHW.flatten(1)
        return functional.unfold(x_CHW, self.kernel, self.dilation, self.padding, self.stride)

    def add_back(self, columns: Tensor, size: tuple[int, int]) -> Tensor:
        """The adjoint of ``patches``."""
        if self.is_pointwise:
            return columns.view(-1, *size)
        return functional.fold(columns, size, self.kernel, self.dilation, self.padding, self.stride)


def _times_columns(matrix_OI: Tensor, x_IL: Tensor, y_OL: Tensor) -> None:
    for columns in blocks(x_IL.shape[1], COLUMNS):
        times(matrix_OI, x_IL[:, columns], y_OL.shape[0], y_OL[:, columns])


class _SparseConvolution(torch.autograd.Function):
    """x_NCHW, values_Z, bias_O -> y_NOHW."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NCHW: Tensor,
        values_Z: Tensor,
        bias_O: Tensor | None,
        pattern: CsrPattern,
        geometry: _Geometry,
    ) -> Tensor:
        height, width = geometry.output((x_NCHW.shape[2], x_NCHW.shape[3]))
        y_NOL = x_NCHW.new_empty(x_NCHW.shape[0], pattern.size[0], height * width)
        matrix = pattern.matrix(values_Z)
        for x_CHW, y_OL in zip(x_NCHW, y_NOL, strict=True):
            _times_columns(matrix, geometry.patches(x_CHW), y_OL)
        if bias_O is not None:
            y_NOL += bias_O[:, None]
        ctx.save_for_backward(x_NCHW if ctx.needs_input_grad[1] else None, values_Z)
        ctx.pattern, ctx.geometry, ctx.shape = pattern, geometry, x_NCHW.shape
        return y_NOL.view(x_NCHW.shape[0], pattern.size[0], height, width)

    @staticmethod
    @single_backward("SparseConv2d")
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_NOHW,) = grads
        (x_NCHW, values_Z), pattern, geometry = ctx.saved_tensors, ctx.pattern, ctx.geometry
        size, dx_NCHW, dvalues_Z = (ctx.shape[2], ctx.shape[3]), None, None
        g_NOL = g_NOHW.contiguous().flatten(2)
        if ctx.needs_input_grad[0]:
            matrix_t = pattern.transposed(values_Z)
            dx_NCHW = g_NOHW.new_empty(ctx.shape)
            for g_OL, dx_CHW in zip(g_NOL, dx_NCHW, strict=True):
                columns = g_OL.new_empty(pattern.size[1], g_OL.shape[1])
                _times_columns(matrix_t, g_OL, columns)
                dx_CHW.copy_(geometry.add_back(columns, size))
                del columns
        if x_NCHW is not None:
            dvalues_Z = torch.zeros_like(values_Z)
            for g_OL, x_CHW in zip(g_NOL, x_NCHW, strict=True):
                pattern.add_gradient(dvalues_Z, g_OL, geometry.patches(x_CHW).contiguous())
        dbias_O = g_NOL.sum((0, 2)) if ctx.needs_input_grad[2] else None
        return dx_NCHW, dvalues_Z, dbias_O, None, None


@component(Column.WEIGHTS, Exactness.EXACT, PAPER)
class SparseConv2d(CsrWeight):
    """``SparseConv2d.from_dense(conv, sparsity=0.9)`` in the place of an ``nn.Conv2d``.

    ``values`` is the only weight: one entry a nonzero. Raises ``UnsupportedError`` for groups, for padding that is not
    of zeros or not the same on both sides, off the CPU, and in other dtypes than float32 and float64.
    """

    def __init__(self, conv: nn.Conv2d, mask: Tensor) -> None:
        self._check(conv)
        super().__init__(conv.weight.flatten(1), mask.flatten(1), conv.bias)
        # of both sides of width, then of height
        right, left, bottom, top = conv._reversed_padding_repeated_twice
        if right != left or bottom != top:
            raise UnsupportedError(f"expected padding that is the same on both sides, got {conv}")
        self.shape = tuple(conv.weight.shape)
        self.geometry = _Geometry(conv.kernel_size, conv.dilation, (top, left), conv.stride)

    @staticmethod
    def _check(conv: nn.Conv2d) -> None:
        if conv.groups != 1 or conv.padding_mode != "zeros":
            raise UnsupportedError(f"expected one group and padding with zeros, got {conv}")

    @classmethod
    def from_dense(
        cls, conv: nn.Conv2d, *, sparsity: float | None = None, mask: Tensor | None = None
    ) -> SparseConv2d:
        """Keep the weights of largest magnitude, or those where ``mask`` is True; values and bias are copied."""
        return cls(conv, checked_mask(conv.weight, sparsity, mask)).train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """A dense layer that computes the same, zeros and all."""
        g, (outputs, channels, *_) = self.geometry, self.shape
        pairs: dict[str, Any] = {"padding": g.padding, "stride": g.stride, "dilation": g.dilation}
        has_bias, kernel = self.bias is not None, (g.kernel[0], g.kernel[1])
        dense = nn.Conv2d(channels, outputs, kernel, bias=has_bias, **pairs)
        self.fill(dense)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W), or (C, H, W), as ``nn.Conv2d``."""
        if torch.is_autocast_enabled("cpu"):
            x = x.to(self.values.dtype)
        check_input(x, self.values, self.shape[1], -3)
        x_NCHW = x if x.dim() == 4 else x.unsqueeze(0)
        convolve: Any = _SparseConvolution.apply
        y = convolve(x_NCHW, self.values, self.bias, self.pattern, self.geometry)
        return y if x.dim() == 4 else y.squeeze(0)

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.shape[1]}, {self.shape[0]}, {self.geometry}, sparsity={self.sparsity:.3f}"
