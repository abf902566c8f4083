"""Keeps of each piece of a linear layer's input its projection onto one fixed direction.

Formula: a row of x is cut into pieces z of M elements; z is kept as p = z . v and comes back as p v, v the mean direction of
    the pieces of the first batch; dW = g^T x with what came back, dx = g W exactly
Memory: activations: 1 / M of the inputs that linear layers save. Time: one product forward and one outer product backward.
Exactness: approximate: gradients of inputs are exact, those of weights see only what lies along v, and the whole gradient is off
    as far as ``measure(sensitivity=True)`` found it to be: usually far.
Limits: tensors that backward uses in matrix products alone, made inside the block, 16 KiB and more, with rows of a multiple
    of M elements; v is of the first batch and not in a checkpoint.
References: Miles et al. (2024), section 3. *departs:* attached to saved tensors of every linear layer in a block, where the paper
    picks some layers (value and down projections) and pairs them with LoRA; no scale of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slimgrad.code import Code, Use
from slimgrad.coding.velora import VeloraCode
from slimgrad.errors import MethodError
from slimgrad.method import Paper
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.stochastic_store import LINEAR
from slimgrad.types import Exactness


@dataclass(frozen=True)
class Velora(CodedStore):
    """``sub_token`` elements a piece."""

    sub_token: int = 32

    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE
    is_near: ClassVar[bool] = False
    paper: ClassVar[Paper] = Paper(
        "VeLoRA: Memory Efficient Training using Rank-1 Sub-Token Projections",
        "Roy Miles, Pradyumna Reddy, Ismail Elezi, Jiankang Deng",
        2024,
        "2405.17991",
    )

    def __post_init__(self) -> None:
        if self.sub_token < 1:
            raise MethodError(f"sub_token must be at least 1, found {self.sub_token}")

    @classmethod
    def strengths(cls) -> Sequence[Velora]:
        """One size of pieces."""
        return [cls()]

    def suits(self, use: Use) -> bool:
        """What matrix products alone read, in rows that can be cut."""
        is_linear = bool(use.readers) and use.readers <= LINEAR - {"convolution_backward"}
        return is_linear and use.row % self.sub_token == 0

    def code(self) -> Code:
        """Projections; the direction is of the first tensor that this place sees."""
        return VeloraCode(self.sub_token)
