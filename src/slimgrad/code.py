"""What a compressed store is: a tensor encoded into few bytes, and made again from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """A storage that backward asks for, and what for.

    ``row`` is the number of elements along its fastest dimension when it was made (the width of a layer's output);
    ``readers`` are the names of the operations of backward that read it (``"mm"``, ``"gelu_backward"``), views left
    out.
    """

    num_elements: int
    dtype: str  # as torch names it: "float32"
    row: int
    readers: frozenset[str]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype)

    @property
    def is_floating(self) -> bool:
        """Whether its elements are real numbers."""
        return self.torch_dtype.is_floating_point


class Encoded(Protocol):
    """A tensor as a code keeps it."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors that it holds."""
        ...

    def decode(self) -> Tensor:
        """The tensor, or what the code makes of it: same shape, strides, dtype and device, a storage of its own."""
        ...


class Code(Protocol):
    """One way to keep a saved tensor. What it remembers from call to call belongs to one place of one model."""

    def encode(self, tensor: Tensor) -> Encoded:
        """``tensor`` in few bytes; it is dense (its elements fill a stretch of memory, in any order of dimensions)."""
        ...

    def num_bytes(self, use: Use) -> int:
        """Bytes of ``encode``'s result, known before."""
        ...
