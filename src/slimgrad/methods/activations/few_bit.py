"""Keeps 1 to 4 bits of an activation function's input: backward multiplies by the best step function of its derivative.

Formula: y = f(x) as ever; dx = g y_i in place of g f'(x), x in the i-th of 2^bits intervals, whose boundaries and levels
    y_i minimise the squared distance to f' over [-10, 10] (dynamic programming)
Memory: activations: bits / 32 of what the activation function saves in float32. Time: finding the interval and packing
    forward, a table look-up backward; nothing is run again.
Exactness: approximate: the forward pass is bit-equal; the gradient of each element is off by the distance of f' to its
    level, and the whole gradient as far as ``measure(sensitivity=True)`` found it to be.
Limits: GELU, SiLU, SELU, tanh, sigmoid, ELU of alpha 1 and softplus of beta 1 (not in place) that PyTorch's own
    operations compute, whose saved tensor no other operation of backward reads (a function spelled out in products and
    powers is not one); made inside the block, 16 KiB and more.
References: Novikov et al. (2022), section 3 (the minimisation and its dynamic programme). *departs:* attached to saved tensors:
    backward's own operation is given a number at which the derivative is the level, so no layer is replaced; GELU's
    levels serve both of its formulas, which differ by less than 0.001.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.few_bit import FewBitCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.types import Exactness

READERS = {
    "gelu": "gelu_backward",
    "silu": "silu_backward",
    "selu": "elu_backward(1.67326, 1.0507, 1, 0)",
    "elu": "elu_backward(1, 1, 1, 0)",
    "softplus": "softplus_backward(1, 20)",
    "tanh": "tanh_backward",
    "sigmoid": "sigmoid_backward",
}
FUNCTIONS = tuple(READERS)


@dataclass(frozen=True)
class FewBit(CodedStore):
    """``bits`` (1 to 4) an element of what ``function`` saves: gelu, silu, selu, elu, softplus, tanh or sigmoid."""

    function: str = "gelu"
    bits: int = 3

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    is_near: ClassVar[bool] = False
    paper: ClassVar[Paper] = Paper(
        "Few-Bit Backward: Quantized Gradients of Activation Functions for Memory Footprint Reduction",
        "Georgii Novikov, Daniel Bershatsky, Julia Gusak, Alex Shonenkov, Denis Dimitrov, Ivan Oseledets",
        2022,
        "2202.00441",
    )

    def __post_init__(self) -> None:
        if self.function not in FUNCTIONS:
            raise MethodError(f"function must be one of {FUNCTIONS}, found {self.function!r}")
        if self.bits not in (1, 2, 3, 4):
            raise MethodError(f"bits must be 1 to 4, found {self.bits}")

    @classmethod
    def strengths(cls) -> Sequence[FewBit]:
        """4, 3 and 2 bits of each function."""
        return [cls(function=function, bits=bits) for function in FUNCTIONS for bits in (4, 3, 2)]

    def suits(self, use: Use) -> bool:
        """What the function's own backward alone reads."""
        return use.readers == frozenset([READERS[self.function]])

    def code(self) -> Code:
        """The intervals' numbers, packed."""
        return FewBitCode(self.function, self.bits)
