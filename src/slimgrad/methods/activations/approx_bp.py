"""Keeps 2 bits of the input of GELU or SiLU: backward multiplies by the derivative of a near sum of three ReLUs.

Formula: y = f(x) as ever; dx = g h'(x), h the sum of three ReLUs that is nearest to f: h' has the levels 0, a, 1 - a and 1
Memory: activations: 1/16 of what GELU or SiLU saves in float32. Time: finding the level and packing forward, a table
    look-up backward; nothing is run again.
Exactness: approximate: the forward pass is bit-equal; h is near to f, so that the error of its derivative averages out over
    inputs; the whole gradient is off as far as ``measure(sensitivity=True)`` found it to be.
Limits: GELU and SiLU that PyTorch's own operations compute, whose saved tensor no other operation of backward reads; made
    inside the block, 16 KiB and more.
References: Yang et al. (2024), section 4 (ReGELU2 and ReSiLU2). *departs:* attached to saved tensors, so no layer is
    replaced; coefficients are computed from the symmetry of f instead of by annealing. Its memory-sharing norms are
    ``memory_sharing_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.approx_bp import ApproxBpCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.types import Exactness

FUNCTIONS = ("gelu", "silu")


@dataclass(frozen=True)
class ApproxBp(CodedStore):
    """2 bits an element of what ``function`` saves: gelu or silu."""

    function: str = "gelu"

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    is_near: ClassVar[bool] = False
    paper: ClassVar[Paper] = Paper(
        "Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation",
        "Yuchen Yang, Yingdong Shi, Cheems Wang, Xiantong Zhen, Yuxuan Shi, Jun Xu",
        2024,
        "2406.16282",
    )

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise MethodError(f"function must be one of {FUNCTIONS}, found {self.function!r}")

    @classmethod
    def strengths(cls) -> Sequence[ApproxBp]:
        """Each function."""
        return [cls(function=function) for function in FUNCTIONS]

    def suits(self, use: Use) -> bool:
        """What the function's own backward alone reads."""
        return use.readers == frozenset([f"{self.function}_backward"])

    def code(self) -> Code:
        """The levels' numbers, packed."""
        return ApproxBpCode(self.function)
