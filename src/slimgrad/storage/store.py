"""The interface of a store, and the checks that every store makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from slimgrad.errors import StorageError

PAGE_BYTES = 4096
"""Slots are whole pages."""

MAX_PENDING_BYTES = 16 * 2**20
"""How many bytes may wait to be written: their source tensors are alive until they are."""


@final
class Slot:
    """A place for ``num_bytes`` bytes in a store, from ``allocate`` until ``free``."""

    __slots__ = ("is_live", "num_bytes", "position")

    def __init__(self, position: int, num_bytes: int) -> None:
        self.position = position
        self.num_bytes = num_bytes
        self.is_live = True


class Transfer(ABC):
    """A read or write under way. It keeps its tensor alive until it is done, and no longer."""

    @abstractmethod
    def wait(self) -> None:
        """Return when the transfer is done; raises ``StorageError`` for what went wrong, each time."""

    @abstractmethod
    def settle(self) -> None:
        """Return when the bytes have been moved, without raising."""


class Store(ABC):
    """Slots of bytes outside ``device``. All methods raise ``StorageError`` once the store is closed."""

    device: torch.device

    @abstractmethod
    def allocate(self, num_bytes: int) -> Slot:
        """A slot for ``num_bytes`` bytes."""

    @abstractmethod
    def free(self, slot: Slot) -> None:
        """Give ``slot`` back; its place is used again. May be called from any thread, and after close."""

    @abstractmethod
    def start_write(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Write a contiguous ``tensor`` of any dtype to ``slot``; it must not be modified until that is done.

        Blocks while more than ``MAX_PENDING_BYTES`` wait to be written.
        """

    @abstractmethod
    def start_read(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Fill a contiguous ``tensor`` of any dtype from ``slot``. Its version counter stays as it is."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was started and give everything back."""

    def write(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> None:
        """``start_write``, waited for."""
        self.start_write(slot, tensor, offset_bytes).wait()

    def read(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> None:
        """``start_read``, waited for."""
        self.start_read(slot, tensor, offset_bytes).wait()


def check_transfer(slot: Slot, tensor: Tensor, offset_bytes: int, device: torch.device) -> int:
    """The bytes of ``tensor``, if it can be moved as one piece to or from its place in ``slot``."""
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise StorageError("expected a contiguous tensor, found another layout: call .contiguous()")
    if tensor.device.type != device.type or tensor.is_conj() or tensor.is_neg():
        raise StorageError(
            f"expected a plain tensor on {device}, found one on {tensor.device} or one whose conjugation "
            "is pending: move it, and call .resolve_conj().resolve_neg()"
        )
    num_bytes = tensor.numel() * tensor.element_size()
    if not slot.is_live:
        raise StorageError("this slot was freed: allocate another")
    if offset_bytes < 0 or offset_bytes + num_bytes > slot.num_bytes:
        raise StorageError(
            f"a slot of {slot.num_bytes} bytes cannot hold {num_bytes} bytes at {offset_bytes}: allocate a larger one"
        )
    return num_bytes


MODIFIED = (
    "a tensor was modified by an in-place operation while it was being written to the store, so what was "
    "written is neither its old value nor its new one: do not modify what backward needs"
)


def version_of(tensor: Tensor) -> int:
    """How often ``tensor`` was modified in place; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def dense_view(tensor: Tensor) -> Tensor | None:
    """``tensor``'s elements as a flat view in the order of memory, or None if they do not fill one block of it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def same_order(shape: Sequence[int], stride: Sequence[int], other: Sequence[int]) -> bool:
    """Whether elements of these strides lie in memory in the order of the ``other``."""
    return all(a == b for n, a, b in zip(shape, stride, other, strict=True) if n != 1)


def flat_like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor``'s elements, flat, in the order in which dense ``other`` of its shape has its own in memory.

    A view where that is the tensor's order too, else a copy.
    """
    if not same_order(tensor.shape, tensor.stride(), other.stride()):
        tensor = tensor.detach().new_empty_strided(other.shape, other.stride()).copy_(tensor)
    flat = dense_view(tensor)
    assert flat is not None
    return flat
