"""Keeps what backward only multiplies with as codes of 8, 4 or 2 bits, rounded so that the gradient stays unbiased.

Formula: as ``quantized_store``, with c = floor((x - m) / s + u), u uniform in [0, 1): E[m + c s] = x
Memory: activations: bits / 32 of the float32 tensors that matrix products and convolutions save, and 1/128 for the
    ranges; what other operations save stays. Time: one sweep over them forward, with random numbers, and one backward.
Exactness: unbiased: the forward pass is bit-equal, gradients of activations are exact, and gradients of weights are linear
    in what is kept, so that their mean over the rounding is exact; their variance is that of the rounding, and
    ``error`` bounds it by what ``measure(sensitivity=True)`` found on one draw.
Limits: tensors that backward uses in matrix products and convolutions alone: what an activation function, a norm or a
    fused attention saves enters in a way that is not linear, and batched products multiply activations with each other:
    a tensor in both factors would be squared, its variance a bias. Of two activations in one unbatched product this
    cannot be told: there the claim does not hold. One tensor that two products use is rounded once for both,
    which is still unbiased in each, but not where the gradient goes through one and then the other, as with a weight that the
    block makes and uses again and again. A step that is resumed draws anew from ``seed``. Else as ``quantized_store``.
References: Chen et al. (2021), sections 3 and 4.1: unbiased gradients from stochastically rounded activations; groups of
    256. *departs:* only saved tensors whose use is linear, so that the claim holds to the letter; bits for each
    block under one bound on the error of the whole gradient, in place of bits for each group by its own range.
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

LINEAR = frozenset(["mm", "addmm", "convolution_backward"])


@dataclass(frozen=True)
class StochasticStore(CodedStore):
    """``bits`` an element: 8, 4 or 2. Random numbers come from a generator of its own, from ``seed`` on."""

    bits: int = 8
    seed: int = 0

    exactness: ClassVar[Exactness] = Exactness.UNBIASED
    paper: ClassVar[Paper] = Paper(
        "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training",
        "Jianfei Chen, Lianmin Zheng, Zhewei Yao, Dequan Wang, Ion Stoica, Michael W. Mahoney, Joseph E. Gonzalez",
        2021,
        "2104.14129",
    )

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise MethodError(f"bits must be 2, 4 or 8, found {self.bits}")

    @classmethod
    def strengths(cls) -> Sequence[StochasticStore]:
        """8, 4 and 2 bits."""
        return [cls(bits=bits) for bits in (8, 4, 2)]

    def suits(self, use: Use) -> bool:
        """What matrix products and convolutions alone read."""
        return bool(use.readers) and use.readers <= LINEAR

    def code(self) -> Code:
        """Group-wise, rounded up or down at random."""
        return GroupCode(self.bits, stochastic=True, seed=self.seed)
