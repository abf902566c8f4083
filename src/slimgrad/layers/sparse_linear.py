"""A linear layer with unstructured sparse weights: forward, input gradient and weight gradient cost what the nonzeros do.

Formula: y = W x + b; dx = W^T g; dw_k = g[row k] . x[col k] for each nonzero k, and for nothing else
Memory: weights are one value and 12 bytes of indices a nonzero (column, and column and place in the transpose; a
    dense weight has 4 bytes an entry); gradient and optimizer state have one entry a nonzero. Saved for backward: the
    input, as in a dense layer. Temporaries: 64 rows of inputs and outputs, transposed; in the weight gradient 512; in
    the input gradient a copy of the values. Time: sparsity has to pass a break-even, which depends on the
    machine and the shape (``break_even_sparsity`` measures it). At 0.95, 512 rows and 1024 x 1024 weights it took
    0.53 of the time of a dense layer under a mask, on one core (docs/own_code.md).
Exactness: exact: sums over nonzeros, in another order than the dense products.
Limits: on the CPU, in float32 or float64 (autocast runs it in float32): anything else raises ``UnsupportedError``;
    which weights are nonzero stays as it was made; no second derivatives. In a trace on fake tensors its products
    take no seconds: times come from whole passes.
References: Nikdan et al. (2023), section 3 (algorithm for linear layers: CSR, inputs transposed so that the batch is
    the vector). *departs:* a CSR copy of the transposed pattern, so that the input gradient is a product of the same
    kind as forward; products by MKL and torch's sampled product, in blocks of rows, no code of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.layers.csr_pattern import (
    GRADIENT_COLUMNS,
    ROWS,
    CsrPattern,
    blocks,
    check_input,
    checked_mask,
    times,
)
from slimgrad.method import Paper, component
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

PAPER = Paper(
    "SparseProp: Efficient Sparse Backpropagation for Faster Training of Neural Networks",
    "Mahdi Nikdan, Tommaso Pegolotti, Eugenia Iofinova, Eldar Kurtic, Dan Alistarh",
    2023,
    "2302.04852",
)


def _times_rows(matrix_OI: Tensor, x_NI: Tensor, num_outputs: int) -> Tensor:
    """Row by row W x, contiguous: each block of rows is transposed on the way in and on the way out."""
    y_NO = x_NI.new_empty(x_NI.shape[0], num_outputs)
    for rows in blocks(x_NI.shape[0], ROWS):
        y_NO[rows] = times(matrix_OI, x_NI[rows].t().contiguous(), num_outputs).t()
    return y_NO


class _SparseAffine(torch.autograd.Function):
    """x_NI, values_Z, bias_O -> y_NO."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, values_Z: Tensor, bias_O: Tensor | None, pattern: CsrPattern
    ) -> Tensor:
        y_NO = _times_rows(pattern.matrix(values_Z), x_NI, pattern.size[0])
        if bias_O is not None:
            y_NO += bias_O
        needs_x = ctx.needs_input_grad[1]  # the input gradient alone does not ask for it
        ctx.save_for_backward(x_NI if needs_x else None, values_Z)
        ctx.pattern = pattern
        return y_NO

    @staticmethod
    @single_backward("SparseLinear")
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g_NO,) = grads
        (x_NI, values_Z), pattern = ctx.saved_tensors, ctx.pattern
        dx_NI = dvalues_Z = None
        if ctx.needs_input_grad[0]:
            dx_NI = _times_rows(pattern.transposed(values_Z), g_NO, pattern.size[1])
        if x_NI is not None:
            dvalues_Z = torch.zeros_like(values_Z)
            for rows in blocks(x_NI.shape[0], GRADIENT_COLUMNS):
                factors = (t[rows].t().contiguous() for t in (g_NO, x_NI))
                pattern.add_gradient(dvalues_Z, *factors)  # which keeps them no longer
        return dx_NI, dvalues_Z, g_NO.sum(0) if ctx.needs_input_grad[2] else None, None


class CsrWeight(nn.Module):
    """A weight kept as its nonzeros: the parameter ``values``, one-dimensional, and buffers with the indices."""

    def __init__(self, weight_OI: Tensor, mask_OI: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.size: tuple[int, int] = (weight_OI.shape[0], weight_OI.shape[1])
        pattern = CsrPattern.of(mask_OI)
        self.values = nn.Parameter(weight_OI.detach()[mask_OI])
        for name in ("crow", "col", "crow_t", "col_t", "order"):
            self.register_buffer(name, getattr(pattern, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @property
    def pattern(self) -> CsrPattern:
        """Where the nonzeros are."""
        index: Any = self
        return CsrPattern(self.size, index.crow, index.col, index.crow_t, index.col_t, index.order)

    def fill(self, dense: nn.Linear | nn.Conv2d) -> None:
        """Give a dense layer this weight, zeros and all, and the bias."""
        weight = self.pattern.dense(self.values).view(dense.weight.shape)
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().clone())

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return 1 - self.values.numel() / (self.size[0] * self.size[1])


@component(Column.WEIGHTS, Exactness.EXACT, PAPER)
class SparseLinear(CsrWeight):
    """``SparseLinear.from_dense(linear, sparsity=0.9)`` in the place of an ``nn.Linear``.

    ``values`` is the only weight: one entry a nonzero. Raises ``UnsupportedError`` off the CPU and in other dtypes
    than float32 and float64, ``MethodError`` for inputs of another width.
    """

    @classmethod
    def from_dense(
        cls, linear: nn.Linear, *, sparsity: float | None = None, mask: Tensor | None = None
    ) -> SparseLinear:
        """Keep the weights of largest magnitude, or those where ``mask`` is True; values and bias are copied."""
        made = cls(linear.weight, checked_mask(linear.weight, sparsity, mask), linear.bias)
        return made.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer that computes the same, zeros and all."""
        num_outputs, num_inputs = self.size
        dense = nn.Linear(num_inputs, num_outputs, bias=self.bias is not None)
        self.fill(dense)
        return dense

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        if torch.is_autocast_enabled("cpu"):
            x = x.to(self.values.dtype)
        check_input(x, self.values, self.size[1], -1)
        x_NI = x.reshape(-1, self.size[1])
        y_NO: Any = _SparseAffine.apply(x_NI, self.values, self.bias, self.pattern)
        return y_NO.view(*x.shape[:-1], self.size[0])

    def extra_repr(self) -> str:
        """For print."""
        return (
            f"in_features={self.size[1]}, out_features={self.size[0]}, sparsity={self.sparsity:.3f}"
        )
