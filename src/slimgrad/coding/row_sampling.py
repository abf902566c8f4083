"""Rows (tokens) sampled for the weight gradient: the largest surely, of the rest a few, scaled so that the mean is right.

Formula: ``k`` of ``n`` rows are kept. With ``p_i = |x_i| / sum_j |x_j|``, the set ``C`` of the rows with the largest ``p`` is
    kept as it is, and ``k - |C|`` rows are drawn with replacement from the others, ``j`` with probability
    ``p_j / (1 - sum_C p)``, each scaled by ``(1 - sum_C p) / ((k - |C|) p_j)``. ``|C|`` makes ``(1 - sum_C p) / (k - |C|)``
    least, and with it the bound of the variance. The decoded tensor has zeros in all other rows.
Memory: ``k`` rows and a number of 8 bytes for each.
Exactness: unbiased: the mean of the decoded tensor is the tensor, and so that of every product with it.
Limits: for tensors that backward only multiplies by, as the input of a linear layer for its weight gradient; in nonlinear
    uses the mean of the decoded tensor says nothing. NaN makes all rows NaN.
References: Liu et al., WTA-CRS, arXiv 2305.15265: the estimator, the choice of ``|C|`` for least variance, and
    its unbiasedness. *departs:* the paper's probabilities are products of the norms of activations and of the output
    gradients of an earlier step; what is saved is encoded before its gradient is known and no gradient is passed to a
    code, so they are the norms of the activations alone (the paper's own choice where there is no gradient yet).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimgrad.code import Use
from slimgrad.coding.draws import Draws
from slimgrad.coding.memory_order import Form, in_memory_order
from slimgrad.coding.velora import row_of
from slimgrad.errors import MethodError, UnsupportedError


@dataclass(frozen=True)
class RowSamplingCode:
    """Keeps the ratio ``keep`` of the rows along a tensor's fastest dimension, by winner-take-all sampling.

    ``is_winner_take_all=False`` samples all of them (plain column-row sampling). The code draws from a generator of
    its own, which starts from ``seed``.
    """

    keep: float = 0.3
    is_winner_take_all: bool = True
    seed: int = 0
    draws: Draws = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise MethodError(f"expected keep in (0, 1], found {self.keep}")
        object.__setattr__(self, "draws", Draws(self.seed))

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> RowsEncoded:
        """A sample of the rows of ``tensor``. Raises UnsupportedError where it is not of a real floating dtype."""
        if not tensor.dtype.is_floating_point:
            raise UnsupportedError(f"expected a floating-point tensor, found {tensor.dtype}")
        x_ND = in_memory_order(tensor).view(-1, max(1, row_of(tensor)))
        k = num_kept(len(x_ND), self.keep)
        if k == len(x_ND):
            rows, scale = torch.arange(k, device=x_ND.device), None
        else:
            norms_N = torch.linalg.vector_norm(x_ND, dim=1, dtype=torch.float64)
            generator = self.draws.on(x_ND.device)
            rows, scale = sample_rows(norms_N, k, generator, self.is_winner_take_all)
        kept_KD = x_ND[rows]
        if scale is not None:
            kept_KD.mul_(scale.to(x_ND.dtype).unsqueeze(1))
        return RowsEncoded(kept_KD, rows, Form.of(tensor))

    def num_bytes(self, use: Use) -> int:
        """Bytes of the kept rows and of their numbers."""
        if not use.num_elements:
            return 0
        k = num_kept(use.num_elements // use.row, self.keep)
        return k * (use.row * use.torch_dtype.itemsize + 8)


@dataclass(frozen=True)
class RowsEncoded:
    """Scaled rows, ``[K, D]``, and where they belong, ``[K]``; one that was drawn twice is there twice."""

    kept: Tensor
    rows: Tensor
    form: Form

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows and of their numbers."""
        return self.kept.nbytes + self.rows.nbytes

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The kept rows in their places, zeros elsewhere."""
        out = self.form.empty().zero_()
        if out.numel():
            in_memory_order(out).view(-1, self.kept.shape[1]).index_add_(0, self.rows, self.kept)
        return out


def num_kept(num_rows: int, keep: float) -> int:
    """Rows that are kept, at least one."""
    return min(num_rows, max(1, int(keep * num_rows)))


def sample_rows(
    norms_N: Tensor, k: int, generator: torch.Generator, is_winner_take_all: bool = True
) -> tuple[Tensor, Tensor]:
    """``k`` rows and what each is scaled by: ``sum of scaled rows`` has the sum of all rows as its mean."""
    total = norms_N.sum()
    p_N = torch.where(total > 0, norms_N / total, 1 / len(norms_N))
    p_sorted, order_N = p_N.sort(descending=True)
    surely = num_winners(p_sorted, k) if is_winner_take_all else order_N.new_zeros(())
    is_rest = torch.arange(len(p_N), device=p_N.device) >= surely
    rest_N = torch.where(is_rest, p_sorted, 0.0)
    # where nothing is left to be drawn, the other rows are zeros: any of them will do
    rest_N = torch.where(rest_N.sum() > 0, rest_N, is_rest.to(rest_N.dtype))
    drawn_K = torch.multinomial(rest_N, k, replacement=True, generator=generator)
    scale_K = rest_N.sum() / ((k - surely) * rest_N[drawn_K])
    is_drawn = is_rest[:k]
    rows_K = torch.where(is_drawn, order_N[drawn_K], order_N[:k])
    return rows_K, torch.where(is_drawn, scale_K, 1.0)


def num_winners(p_sorted: Tensor, k: int) -> Tensor:
    """``|C| < k``, the number of rows kept surely that makes the variance's bound least."""
    left = 1 - torch.cat([p_sorted.new_zeros(1), p_sorted[: k - 1].cumsum(0)])
    return (left.clamp_(min=0.0) / torch.arange(k, 0, -1, device=left.device)).argmin()
