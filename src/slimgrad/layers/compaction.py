"""What a linear layer of ``compact`` keeps: its random projection, made again from a seed, and its small gradient.

Shapes: N rows, D inputs, O outputs, R the rank.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slimgrad.coding.projection import directions, seeded
from slimgrad.measuring.fake import is_fake


class Projected:
    """Layers that read the same input project it once: they have one seed, and meet here."""

    def __init__(self, seed: tuple[int, ...], num_layers: int) -> None:
        self.seed, self.num_layers = seed, num_layers
        self._input: weakref.ref[Tensor] | None = None
        self._key: tuple[Any, ...] = ()
        self._z_NR: Tensor | None = None
        self._num_readers = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Projected:
        copied = memo[id(self)] = Projected(self.seed, self.num_layers)
        return copied

    def of(self, x: Tensor, dtype: torch.dtype, compaction: Compaction) -> Tensor:
        """x P; kept until every layer that shares it has asked, or another input comes."""
        key = (x._version, x.shape, dtype, compaction.rank, compaction.num_refreshes)
        is_same = self._input is not None and self._input() is x and self._key == key
        z_NR = self._z_NR if is_same else None
        if z_NR is None:
            x_ND = x.detach().reshape(-1, compaction.width).to(dtype)
            z_NR = x_ND @ compaction.projection(x_ND)
            self._input, self._key, self._num_readers = weakref.ref(x), key, 0
        self._num_readers += 1
        self._z_NR = z_NR if self._num_readers < self.num_layers else None
        return z_NR


class Compaction:
    """The reduced space of one weight: P ~ N(0, 1 / R), never stored, and the gradient in it.

    ``num_refreshes`` counts how often P was changed.
    """

    def __init__(self, weight: Tensor, rank: int, projected: Projected) -> None:
        self.outputs, self.width = weight.shape
        self.rank, self.projected, self.num_refreshes = rank, projected, 0
        self._leaf: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_leaf": None}

    def projection(self, like: Tensor) -> Tensor:
        """P of (D, R), on the device and in the dtype of ``like``; the same again until it is refreshed."""
        words = np.random.SeedSequence([*self.projected.seed, self.num_refreshes, self.width])
        generator = seeded(int(words.generate_state(1, np.uint64)[0]) >> 1, like.device)
        return directions((self.width, self.rank), self.rank, like, generator)

    def leaf(self, weight: Tensor) -> Tensor:
        """A tensor of (O, R) with the storage of one number, whose ``grad`` the small gradient becomes."""
        leaf = self._leaf
        if (
            leaf is None
            or is_fake(weight)
            or (leaf.device, leaf.dtype) != (weight.device, weight.dtype)
        ):
            leaf = weight.detach().new_zeros(()).expand(self.outputs, self.rank).detach()
            leaf.requires_grad_()
            if is_fake(weight):
                return leaf
            self._leaf = leaf
        return leaf

    @property
    def gradient(self) -> Tensor | None:
        """The gradient in the reduced space, (O, R): the sum of g^T x P over backward passes."""
        return None if self._leaf is None else self._leaf.grad

    @gradient.setter
    def gradient(self, value: Tensor | None) -> None:
        if self._leaf is not None:
            self._leaf.grad = value

    def lifted(self) -> Tensor | None:
        """What the gradient is in the weight's own space, (O, D): unbiased over seeds."""
        small = self.gradient
        return None if small is None else small @ self.projection(small).T


def compaction_of(weight: Tensor) -> Compaction | None:
    """The reduced space of a weight; None where it has its gradient as other weights do."""
    return getattr(weight, "compaction", None)


def link(linear: nn.Linear, compaction: Compaction) -> None:
    """Let the optimizer find it; deep copies of parameters lose what is written on them."""
    linear.weight.compaction = compaction  # pyright: ignore[reportAttributeAccessIssue]
