"""Keeps of a linear layer's input a random projection, drawn again from its seed when backward asks for it.

Formula: a row x of width D is kept as z = x P and comes back as z P^T, P of (D, R) with entries N(0, 1/R), R = ratio D;
    dW = g^T x with what came back, dx = g W exactly
Memory: activations: ratio of the inputs that linear layers save; P is not kept: temporaries of 1 MiB, in float32, while it is
    made. Time: random numbers and a product forward, the same again backward; the layer's own products are all there.
Exactness: unbiased: gradients of inputs are exact, and the mean over draws of those of weights; ``error`` bounds their variance
    by what ``measure(sensitivity=True)`` found on one draw: about 1 / ratio times the square of the weights' gradient, so that
    a bound below 1 allows it on few blocks.
Limits: tensors that backward uses in matrix products alone, made inside the block, 16 KiB and more. Rows are those of the
    tensor's fastest dimension. A tensor through which the gradient goes more than once, as a weight that the block makes and
    uses again and again, is decoded to the same each time: there the mean is not the gradient.
References: Shamshoum et al. (2024), figure 2. *departs:* attached to saved tensors, so that the gradient is as wide as the
    weight, for any optimizer, and P is drawn anew for each tensor. The whole method, whose gradients and optimizer stay in the
    reduced space and whose P stays for many updates, is a component (``compact``, ``CompactAdam``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.projection import ProjectionCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.stochastic_store import LINEAR
from slimgrad.types import Exactness


@dataclass(frozen=True)
class ProjectedStore(CodedStore):
    """``ratio`` in (0, 1] of the width of rows; ``seed`` of its own random numbers."""

    ratio: float = 0.25
    seed: int = 0

    exactness: ClassVar[Exactness] = Exactness.UNBIASED
    is_near: ClassVar[bool] = False
    paper: ClassVar[Paper] = Paper(
        "CompAct: Compressed Activations for Memory-Efficient LLM Training",
        "Yara Shamshoum, Nitzan Hodos, Yuval Sieradzki, Assaf Schuster",
        2024,
        "2410.15352",
    )

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise MethodError(f"ratio must be in (0, 1], found {self.ratio}")

    @classmethod
    def strengths(cls) -> Sequence[ProjectedStore]:
        """One share of the width."""
        return [cls()]

    def suits(self, use: Use) -> bool:
        """What matrix products alone read, in rows."""
        products = LINEAR - {"convolution_backward"}
        return bool(use.readers) and use.readers <= products and use.row < use.num_elements

    def code(self) -> Code:
        """Projected rows; P is of the seed's next number."""
        return ProjectionCode(self.ratio, seed=self.seed)
