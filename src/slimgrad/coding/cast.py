"""The code that keeps a tensor in a narrower floating dtype."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimgrad.code import Use


@dataclass(frozen=True)
class _Cast:
    narrow: Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.narrow.nbytes

    def decode(self) -> Tensor:
        return self.narrow.to(self.dtype)


@dataclass(frozen=True)
class CastCode:
    """Keeps ``dtype`` (bfloat16: the range of float32 and 8 bits of precision)."""

    dtype: torch.dtype = torch.bfloat16

    def encode(self, tensor: Tensor) -> _Cast:
        """Each element rounded to the nearest of the narrower dtype; at most half of that dtype's epsilon off."""
        return _Cast(tensor.to(self.dtype), tensor.dtype)

    def num_bytes(self, use: Use) -> int:
        """Bytes of the narrower tensor."""
        return use.num_elements * self.dtype.itemsize
