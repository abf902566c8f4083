"""Keeps what blocks save for backward in 8 bits, within ranges that are remembered from step to step.

Formula: c = clip(round((x - b) 255 / r)); x <- b + c r / 255; b and r, for each attention head or else for the tensor, move
    to what is seen with momentum 0.9; rounding is stochastic
Memory: activations: a quarter of the float32 tensors that a block makes and saves, and two numbers a head. Time: one sweep
    over them forward, with random numbers, and one backward.
Exactness: approximate: the forward pass is bit-equal; what lies outside the remembered range is clipped to it, and the whole
    gradient is off as far as ``measure(sensitivity=True)`` found it to be in the first step, whose ranges are its own.
Limits: tensors of shape (samples, heads, tokens, size) have a range for each head, all others one. Floating-point tensors
    of 16 KiB and more, made inside the block; what the ranges are is not in a checkpoint. Where values drift fast from step
    to step, or groups differ much, ``quantized_store`` is nearer for 1/32 more bytes.
References: Pan et al. (2021), section 3 (head-wise quantisation, running estimates). *departs:* attached to saved tensors, so
    no layer is replaced; what q, k and v share with one storage is one tensor without heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.head_ranges import HeadRangesCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.types import Exactness


@dataclass(frozen=True)
class Mesa(CodedStore):
    """``momentum`` in [0, 1) of the ranges; ``seed`` of the rounding's own random numbers."""

    momentum: float = 0.9
    seed: int = 0

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    paper: ClassVar[Paper] = Paper(
        "Mesa: A Memory-saving Training Framework for Transformers",
        "Zizheng Pan, Peng Chen, Haoyu He, Jing Liu, Jianfei Cai, Bohan Zhuang",
        2021,
        "2111.11124",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise MethodError(f"momentum must be in [0, 1), found {self.momentum}")

    def suits(self, use: Use) -> bool:
        """Every floating-point tensor."""
        return True

    def code(self) -> Code:
        """8 bits, a range for each head."""
        return HeadRangesCode(heads=0, momentum=self.momentum, seed=self.seed)
