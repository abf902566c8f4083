"""What the methods that replace saved tensors share: which tensors they can stand for, and what stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of "
    "{} that a block needs for its backward; do not modify it between forward and backward"
)


class Kept(NamedTuple):
    """What autograd keeps of a tensor that stays: hooks do without its own check of the version."""

    tensor: Tensor
    version: int

    @staticmethod
    def of(tensor: Tensor) -> Kept:
        """The tensor as it is now."""
        return Kept(tensor, tensor._version)

    def checked(self) -> Tensor:
        """The tensor; raises RuntimeError, as autograd does, where it was modified in place since."""
        if self.tensor._version != self.version:
            raise RuntimeError(MODIFIED.format(f"shape {list(self.tensor.shape)}"))
        return self.tensor


class Geometry(NamedTuple):
    """A tensor's place on its storage."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor) -> Geometry:
        """The geometry of ``tensor``."""
        return Geometry(tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())  # pyright: ignore[reportArgumentType]

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """A tensor of this geometry on ``storage``."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        return tensor.set_(storage, self.offset, self.shape, self.stride)  # pyright: ignore[reportArgumentType, reportCallIssue]


def is_plain(tensor: Tensor) -> bool:
    """Whether a storage and a geometry are all there is to ``tensor``."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def returned_tensors(result: Any) -> Sequence[Tensor]:
    """The plain tensors in what a module returned: a nest of containers, or an object with tensors in fields."""
    known = isinstance(result, (Tensor, tuple, list, dict))
    leaves = tree_leaves(result if known else getattr(result, "__dict__", None))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and is_plain(leaf)]
