"""Saved tensors in a file: what ``torch.autograd.graph.save_on_cpu`` is for CUDA, on a CPU machine.

Explicit reads and writes through torch's own buffers, so that a ledger counts every byte in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in the file, and what it looked like."""

    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _SavedFile:
    """Packs each saved tensor into one file; weights and their views stay as they are."""

    def __init__(self, file: int, model: nn.Module) -> None:
        self.file, self.end = file, 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: Tensor) -> Tensor | _Place:
        """Write ``tensor``; weights are in memory anyway."""
        if tensor.untyped_storage().data_ptr() in self.weights or tensor.layout != torch.strided:
            return tensor
        tensor = tensor.detach()
        if not _is_dense(tensor):
            tensor = tensor.contiguous()
        place = _Place(self.end, tensor.size(), tensor.stride(), tensor.dtype)
        self.end += os.pwrite(self.file, _bytes_of(tensor), self.end)
        return place

    def unpack(self, kept: Tensor | _Place) -> Tensor:
        """Read the tensor back into memory of its own."""
        if isinstance(kept, Tensor):
            return kept
        tensor = torch.empty_strided(kept.size, kept.stride, dtype=kept.dtype)
        buffer = _bytes_of(tensor)
        if os.preadv(self.file, [buffer], kept.offset) != len(buffer):
            raise OSError("the file of saved tensors is cut short")
        return tensor


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` fill one stretch of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a dense tensor."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


@contextmanager
def saved_outside(model: nn.Module, folder: Path | None = None) -> Generator[Any]:
    """Tensors saved for backward leave the device within the body: to pinned memory on CUDA, else to a file."""
    if next(model.parameters()).is_cuda:
        with save_on_cpu(pin_memory=True):
            yield
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        saved = _SavedFile(file.fileno(), model)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            yield
