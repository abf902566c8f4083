"""Keeps what blocks save for backward in float32 as bfloat16 until backward asks for it.

Formula: when an operation saves x: S <- bfloat16(x); when backward asks for x: x <- float32(S)
Memory: activations: half of the float32 tensors that a block makes and saves, from the operation that saves them to
    their last use in backward; its inputs and outputs stay. Time: one pass over them forward and one backward.
Exactness: approximate: the forward pass is bit-equal; each saved value is at most 2^-8 of itself off, and the whole
    gradient as far as ``measure(sensitivity=True)`` found it to be.
Limits: float32 tensors of 16 KiB and more, made inside the block; blocks whose calls differ from one another are refused,
    and so is everything in a profile without sensitivity.
References: Micikevicius et al. (2018), section 3: activations in half precision. *departs:* only what is stored is narrow;
    the forward pass, and the arithmetic of backward, stay in float32, in bfloat16's range, so that no loss scale is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.cast import CastCode
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.types import Column, Exactness


@dataclass(frozen=True)
class HalfStore(CodedStore):
    """No hyperparameters: bfloat16."""

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    paper: ClassVar[Paper] = Paper(
        "Mixed Precision Training",
        "Paulius Micikevicius, Sharan Narang, Jonah Alben, Gregory Diamos, Erich Elsen, David Garcia, "
        "Boris Ginsburg, Michael Houston, Oleksii Kuchaiev, Ganesh Venkatesh, Hao Wu",
        2017,
        "1710.03740",
    )

    def suits(self, use: Use) -> bool:
        """Whether it is float32."""
        return use.dtype == "float32"

    def code(self) -> Code:
        """bfloat16, nearest."""
        return CastCode()
