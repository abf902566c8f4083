"""Keeps some rows of a linear layer's input: the largest surely, of the rest a few drawn and scaled without bias.

Formula: of n rows k = keep n are kept: the |C| largest as they are, and k - |C| drawn from the others with probabilities
    proportional to their norms and scaled by the inverse of how often they are expected; |C| makes the variance least.
    dW = g^T x with zeros in the rows that are not kept, dx = g W exactly
Memory: activations: keep of the inputs that linear layers save. Time: norms and a sort forward, a scatter backward; the
    product of backward is over all rows.
Exactness: unbiased: gradients of inputs are exact, and the mean over draws of those of weights; ``error`` bounds their
    variance by what ``measure(sensitivity=True)`` found on one draw, which is large at small ``keep``.
Limits: tensors that backward uses in matrix products alone, made inside the block, 16 KiB and more. Rows are those of the
    tensor's fastest dimension. A tensor through which the gradient goes more than once, as a weight that the block makes and
    uses again and again, is decoded to the same each time: there the mean is not the gradient.
References: Liu et al. (2023), section 3. *departs:* probabilities from the norms of the rows alone, since what is saved is
    kept before its gradient is known (the paper takes those of an earlier step); all layers of a block, where the paper
    leaves some exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.row_sampling import RowSamplingCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.stochastic_store import LINEAR
from slimgrad.types import Exactness


@dataclass(frozen=True)
class WtaCrs(CodedStore):
    """``keep`` in (0, 1] of the rows; ``seed`` of its own random numbers."""

    keep: float = 0.3
    seed: int = 0

    exactness: ClassVar[Exactness] = Exactness.UNBIASED
    is_near: ClassVar[bool] = False
    paper: ClassVar[Paper] = Paper(
        "Winner-Take-All Column Row Sampling for Memory Efficient Adaptation of Language Model",
        "Zirui Liu, Guanchu Wang, Shaochen Zhong, Zhaozhuo Xu, Daochen Zha, Ruixiang Tang, Zhimeng Jiang, "
        "Kaixiong Zhou, Vipin Chaudhary, Shuai Xu, Xia Hu",
        2023,
        "2305.15265",
    )

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise MethodError(f"keep must be in (0, 1], found {self.keep}")

    @classmethod
    def strengths(cls) -> Sequence[WtaCrs]:
        """The paper's share of rows."""
        return [cls()]

    def suits(self, use: Use) -> bool:
        """What matrix products alone read, in rows."""
        products = LINEAR - {"convolution_backward"}
        return bool(use.readers) and use.readers <= products and use.row < use.num_elements

    def code(self) -> Code:
        """Rows and their numbers."""
        return RowSamplingCode(self.keep, seed=self.seed)
