"""An operation that is a softmax-weighted sum of candidates, so that the choice among them is learnt by gradient.

Formula: o(x) = sum_i softmax(alpha)_i o_i(x), alpha the architecture parameters, one a candidate; the choice is
    argmax_i alpha_i.
Memory: activations are those of every candidate, and each candidate's output. Inside a reversible chain they live
    while this one operation is differentiated, and no longer. Time: that of all candidates.
Exactness: exact: weights and architecture parameters get the gradients of the sum as it is written.
Limits: two candidates or more, each with an output of one shape; a candidate of None is the zero operation, and
    takes part in the softmax. What the mixture learns need not be what a chosen candidate does alone: train the
    discrete network anew.
References: Liu et al., DARTS: Differentiable Architecture Search, section 2.2 (continuous relaxation of the choice).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "DARTS: Differentiable Architecture Search",
        "Hanxiao Liu, Karen Simonyan, Yiming Yang",
        2018,
        "1806.09055",
    ),
)
class MixedOperation(nn.Module):
    """``candidates`` by name, each called with what the mixture is called with.

    ``alpha`` are the architecture parameters, (num_candidates,); give one tensor to several mixtures that are to
    make the same choice. Raises ArgumentError for fewer than two candidates or another shape of ``alpha``.
    """

    def __init__(
        self, candidates: Mapping[str, nn.Module | None], alpha: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        if len(candidates) < 2 or not any(candidates.values()):
            raise ArgumentError(
                f"expected 2 or more candidates, one of them not None, found {list(candidates)}"
            )
        if alpha is None:
            alpha = new_alpha(len(candidates))
        if alpha.shape != (len(candidates),):
            raise ArgumentError(
                f"expected alpha of shape ({len(candidates)},), one a candidate, found {tuple(alpha.shape)}"
            )
        self.names = tuple(candidates)
        self.alpha = alpha
        self.candidates = nn.ModuleDict({n: c for n, c in candidates.items() if c is not None})

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum."""
        shares = dict(zip(self.names, self.alpha.softmax(0), strict=True))
        first, *rest = self.candidates
        total = shares[first] * self.candidates[first](x, *args, **kwargs)
        for name in rest:
            total = total + shares[name] * self.candidates[name](x, *args, **kwargs)
        return total

    def chosen(self, exclude: Collection[str] = ()) -> str:
        """The candidate with the largest share, ``exclude`` apart. Raises ArgumentError where none is left."""
        alphas = zip(self.names, self.alpha.tolist(), strict=True)
        left = {name: value for name, value in alphas if name not in exclude}
        if not left:
            raise ArgumentError(f"expected a candidate besides {sorted(exclude)}, found none")
        return max(left, key=left.__getitem__)


def new_alpha(num_candidates: int) -> nn.Parameter:
    """Architecture parameters that prefer next to nothing: N(0, 0.001^2)."""
    return nn.Parameter(1e-3 * torch.randn(num_candidates))
