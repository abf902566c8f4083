"""Keeps what blocks save for backward in 8 bits, within ranges that are remembered from step to step.

Formula: c = clip(round((x - b) 255 / r)); x <- b + c r / 255; b and r, for each attention head or group of channels, move
    to what is seen with momentum 0.9; rounding is stochastic
Memory: activations: a quarter of the float32 tensors that a block makes and saves, and two numbers a group. Time: one sweep
    over them forward, with random numbers, and one backward.
Exactness: approximate: the forward pass is bit-equal; what lies outside the remembered range is clipped to it, and the whole
    gradient is off as far as ``measure(sensitivity=True)`` found it to be in the first step, whose ranges are its own.
    MiniLM with every block coded: below 5 % in the first step, and below 0.7 of what one range a tensor brings, as the
    inputs of norms have some channels far above the others.
Limits: tensors of shape (samples, heads, tokens, size) have a range for each head, those of fewer dimensions for each
    ``group_size`` channels, one for all where those do not fill the last dimension. Floating-point tensors of 16 KiB and
    more, made inside the block; what the ranges are is not in a checkpoint. Where values drift fast from step to step, or
    groups differ much, ``quantized_store`` is nearer for 1/32 more bytes.
References: Pan et al. (2021), section 3 (head-wise quantisation, running estimates), and its code for groups of channels in
    all layers. *departs:* attached to saved tensors, so no layer is replaced; groups are of so many channels, not as
    many as there are heads, so that no model need tell its heads; what q, k and v share with one storage, and heads merged
    with samples, have one range.
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
    """``momentum`` in [0, 1) of the ranges; ``seed`` of the rounding's own random numbers.

    ``group_size`` channels have a range of their own: 32 are a head, or a part of one, in most models. 0: one a layer.
    """

    group_size: int = 32
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
        if self.group_size < 0:
            raise MethodError(f"group_size must be at least 0, found {self.group_size}")

    def suits(self, use: Use) -> bool:
        """Every floating-point tensor."""
        return True

    def code(self) -> Code:
        """8 bits, a range for each head or group of channels."""
        return HeadRangesCode(0, self.group_size, momentum=self.momentum, seed=self.seed)
