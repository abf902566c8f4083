"""A saved tensor as its code in memory, in the place of one that is stored elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgrad.code import Code


class Coded:
    """What ``code`` keeps of ``tensor``, which shows the whole storage of which ``whole`` is a flat view, or a part.

    It answers as ``Stored`` does: nothing is under way, so there is nothing to wait for.
    """

    def __init__(self, code: Code, tensor: Tensor, whole: Tensor) -> None:
        self._encoded = code.encode(tensor if _shows_all(tensor, whole) else whole)

    def settle(self) -> None:
        """Nothing to wait for."""

    def written(self) -> None:
        """Nothing to wait for."""

    def read_ahead(self) -> None:
        """Nothing to begin: decoding is not overlapped."""

    def read(self) -> torch.UntypedStorage:
        """The decoded bytes, in a storage of their own."""
        return self._encoded.decode().untyped_storage()


def _shows_all(tensor: Tensor, whole: Tensor) -> bool:
    """Whether ``tensor`` has each element of its storage once."""
    if tensor.dtype != whole.dtype or tensor.numel() != whole.numel():
        return False
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
