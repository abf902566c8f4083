"""What a compressed store is: a tensor encoded into few bytes, and made again from them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """A storage that backward asks for, and what for.

    ``row`` is the number of elements along its fastest dimension when it was made (the width of a layer's output);
    ``readers`` are the names of the operations of backward that read it (``"mm"``, ``"gelu_backward"``), views left
    out. ``origin`` is the ``origin_after`` of the operations that made the block's storages, up to this one.
    """

    num_elements: int
    dtype: str  # as torch names it: "float32"
    row: int
    readers: frozenset[str]
    origin: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return getattr(torch, self.dtype)

    @property
    def is_floating(self) -> bool:
        """Whether its elements are real numbers."""
        return self.torch_dtype.is_floating_point


def origin_after(operation: str, origin: int = 0) -> int:
    """A number for the operations that made a block's storages, in their order, ``operation`` the last of them.

    Equal numbers of equal storages stand for the same place of the block: another mode of it (dropout switched off,
    autocast) has other operations, and its storages other numbers.
    """
    return zlib.crc32(operation.encode(), origin)


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


@dataclass(frozen=True)
class PlacedCode:
    """A code for the storage of a block that has this ``origin``; 0: for whatever has its number."""

    code: Code
    origin: int = 0

    def is_for(self, origin: int) -> bool:
        """Whether a storage made by these operations is the one that was planned for."""
        return self.origin in (0, origin)
