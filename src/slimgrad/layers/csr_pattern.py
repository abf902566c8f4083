"""Where the nonzeros of a sparse weight lie, and the three products of training with their values.

Shapes: N rows of inputs, I inputs, O outputs, Z nonzeros. ``x_IN`` has one column a row of inputs, as the products
read it; a caller transposes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from slimgrad.errors import MethodError, UnsupportedError

ROWS, COLUMNS = (
    64,
    128,
)  # of a dense factor at a time: with the result they stay in a core's own cache
GRADIENT_COLUMNS = 512  # the sampled product reads them as vectors, which should be long


@dataclass(frozen=True)
class CsrPattern:
    """Rows and columns of a weight's nonzeros in CSR, and of its transpose; all int32.

    ``order[k]`` is the place among the values of the transpose's k-th value.
    """

    size: tuple[int, int]
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    order: Tensor

    @staticmethod
    def of(mask_OI: Tensor) -> CsrPattern:
        """The pattern of a boolean matrix."""
        num_rows, num_columns = mask_OI.shape
        row, col = (index.int() for index in mask_OI.nonzero(as_tuple=True))
        order = torch.argsort(col, stable=True).int()
        return CsrPattern(
            (num_rows, num_columns),
            _starts(row, num_rows),
            col,
            _starts(col, num_columns),
            row[order],
            order,
        )

    def rows(self) -> Tensor:
        """The row of each value."""
        each = torch.arange(self.size[0], dtype=torch.int32, device=self.col.device)
        return torch.repeat_interleave(each, self.crow.diff())

    def dense(self, values_Z: Tensor) -> Tensor:
        """The weight with its zeros."""
        weight = values_Z.new_zeros(self.size)
        weight[self.rows(), self.col] = values_Z.detach()
        return weight

    def matrix(self, values_Z: Tensor) -> Tensor:
        """The weight as a CSR tensor on the very values."""
        return _csr(self.crow, self.col, values_Z, self.size)

    def transposed(self, values_Z: Tensor) -> Tensor:
        """The transposed weight as a CSR tensor, on a copy of the values."""
        values = values_Z.index_select(0, self.order)
        return _csr(self.crow_t, self.col_t, values, (self.size[1], self.size[0]))

    def add_gradient(self, gradient_Z: Tensor, g_ON: Tensor, x_IN: Tensor) -> None:
        """Add to ``gradient_Z`` the entries of g x^T at the nonzeros: no other entry is computed. Both contiguous."""
        into = self.matrix(gradient_Z)
        if gradient_Z.numel() and _holds_values(into):
            torch.sparse.sampled_addmm(into, g_ON, x_IN.t(), beta=1.0, out=into)


def times(
    matrix_OI: Tensor, x_IL: Tensor, num_outputs: int, out_OL: Tensor | None = None
) -> Tensor:
    """W x, into ``out_OL`` where it is given; both dense factors may be columns of larger ones."""
    if out_OL is None:
        out_OL = x_IL.new_empty(num_outputs, x_IL.shape[1])
    if _holds_values(matrix_OI):
        torch.mm(matrix_OI, x_IL, out=out_OL)
    return out_OL


def blocks(length: int, size: int) -> Iterator[slice]:
    """0 to ``length`` in slices of ``size``."""
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def largest(weight: Tensor, sparsity: float) -> Tensor:
    """A mask that keeps the weights of largest magnitude; ``sparsity`` is the share of zeros, in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise MethodError(f"expected a sparsity in [0, 1), the share of zeros, got {sparsity}")
    num_kept = max(1, round((1 - sparsity) * weight.numel()))
    kept = weight.detach().abs().flatten().topk(num_kept).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[kept] = True
    return mask.view(weight.shape)


def checked_mask(weight: Tensor, sparsity: float | None, mask: Tensor | None) -> Tensor:
    """The mask that was given, or that of the largest weights; raises ``MethodError`` unless one of the two is."""
    if (mask is None) == (sparsity is None):
        raise MethodError(
            "expected either sparsity=, the share of zeros, or mask=, True where a weight is kept"
        )
    if sparsity is not None:
        return largest(weight, sparsity)
    assert mask is not None
    if mask.shape != weight.shape:
        raise MethodError(
            f"expected a mask of the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    return mask.to(torch.bool)


def check_input(x: Tensor, values: Tensor, num_features: int, dim: int) -> None:
    """Raise for inputs that the sparse products do not take."""
    if x.device.type != "cpu" or values.device.type != "cpu":
        raise UnsupportedError(f"expected tensors on the CPU, got {x.device} and {values.device}")
    if x.dtype not in (torch.float32, torch.float64) or x.dtype != values.dtype:
        raise UnsupportedError(
            f"expected input and values both in float32 or both in float64, got {x.dtype} and {values.dtype}"
        )
    if x.dim() == 0 or x.shape[dim] != num_features:
        raise MethodError(
            f"expected {num_features} features in dimension {dim}, got {tuple(x.shape)}"
        )


def _starts(sorted_or_not: Tensor, num_bins: int) -> Tensor:
    counts = torch.bincount(sorted_or_not, minlength=num_bins)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


def _holds_values(matrix: Tensor) -> bool:
    return matrix.layout is torch.sparse_csr


def _csr(crow: Tensor, col: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    if isinstance(values, FakeTensor):
        return values  # torch cannot make a fake one of this layout: results have their shapes and no values
    _say_beta_once()
    return torch.sparse_csr_tensor(crow, col, values, size, check_invariants=False)


@functools.cache
def _say_beta_once() -> None:
    """torch warns once a process that its CSR layout is in beta state: nothing that a user could act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), check_invariants=False)
