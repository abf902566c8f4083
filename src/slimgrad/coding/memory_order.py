"""Dense tensors as one stretch of memory: how they are read in order, and made again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimgrad.errors import ArgumentError


@dataclass(frozen=True)
class Form:
    """All of a tensor but its values."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """The form of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def empty(self) -> Tensor:
        """A tensor of this form with a storage of its own, not filled."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


def in_memory_order(tensor: Tensor) -> Tensor:
    """``[n]``: the elements of a dense tensor as they lie in memory; a view, detached.

    Raises ArgumentError where they do not fill a stretch of memory.
    """
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    num_elements = tensor.numel()
    if num_elements and last + 1 != num_elements:
        raise ArgumentError(
            "expected a tensor whose elements fill a stretch of memory, found shape "
            f"{tuple(tensor.shape)} with strides {tensor.stride()}: pass .contiguous()"
        )
    return tensor.detach().as_strided((num_elements,), (1,))
