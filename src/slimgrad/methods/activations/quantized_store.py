"""Keeps what blocks save for backward as group-wise uniform codes of 8, 4 or 2 bits.

Formula: a group of 256 elements with least element m and largest M is kept as m, M and c = round((x - m) / s), with
    s = (M - m) / (2^bits - 1); when backward asks for x: x <- m + c s
Memory: activations: bits / 32 of the float32 tensors that a block makes and saves, and 1/128 for the ranges, from the
    operation that saves them to their last use in backward; the block's inputs and outputs stay. Time: one sweep over
    them forward and one backward, in pieces that stay in the cache.
Exactness: approximate: the forward pass is bit-equal; each saved value is at most half a step of its group off, and the
    whole gradient as far as ``measure(sensitivity=True)`` found it to be. Rounding to the nearest has a quarter of the
    squared error of stochastic rounding at its worst, and a bias; ``stochastic_store`` is the unbiased one.
Limits: floating-point tensors of 16 KiB and more, made inside the block; blocks whose calls differ from one another are
    refused, and so is everything in a profile without sensitivity. NaN or infinity spreads over its group.
References: Liu et al. (2022), sections 4 and 5: bits for each tensor by what they do to the gradient of this model.
    *departs:* what they do is measured with real passes on single blocks and not estimated from one perturbed gradient;
    rounding is to the nearest; recomputation and codes are chosen in one programme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.group_codes import GroupCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.types import Exactness


@dataclass(frozen=True)
class QuantizedStore(CodedStore):
    """``bits`` an element: 8, 4 or 2."""

    bits: int = 8

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    paper: ClassVar[Paper] = Paper(
        "GACT: Activation Compressed Training for Generic Network Architectures",
        "Xiaoxuan Liu, Lianmin Zheng, Dequan Wang, Yukuo Cen, Weize Chen, Xu Han, Jianfei Chen, Zhiyuan Liu, "
        "Jie Tang, Joey Gonzalez, Michael Mahoney, Alvin Cheung",
        2022,
        "2206.11357",
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise MethodError(f"bits must be 2, 4 or 8, found {self.bits}")

    @classmethod
    def strengths(cls) -> Sequence[QuantizedStore]:
        """8, 4 and 2 bits."""
        return [cls(bits=bits) for bits in (8, 4, 2)]

    def suits(self, use: Use) -> bool:
        """Every floating-point tensor."""
        return True

    def code(self) -> Code:
        """Group-wise, rounded to the nearest."""
        return GroupCode(self.bits)
