"""The bytes of one storage outside the device: written once, read back as often as they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from slimgrad.storage import Slot, Store, Transfer

HAND_OVER_S = 1e-4  # seconds that handing one tensor to the store, or back, takes beside its bytes
SMALL_BYTES = 64 * 2**10  # what is smaller is not worth a transfer


class Stored:
    """What ``tensor``, a flat view of a whole storage, shows, in ``store`` as long as this is held."""

    def __init__(self, store: Store, tensor: Tensor) -> None:
        self.num_bytes = tensor.numel() * tensor.element_size()
        self._store = store
        self._read: tuple[Tensor, Transfer] | None = None
        self._slot: Slot = store.allocate(self.num_bytes)
        self._write = store.start_write(self._slot, tensor)

    def settle(self) -> None:
        """Wait until the bytes are written; an error is for who asks for them."""
        self._write.settle()

    def written(self) -> None:
        """Wait until the bytes are written; raises ``StorageError`` for what went wrong."""
        self._write.wait()

    def read_ahead(self) -> None:
        """Start reading."""
        if self._read is None:
            target = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._store.device)
            self._read = target, self._store.start_read(self._slot, target)

    def read(self) -> torch.UntypedStorage:
        """The bytes, in a storage of their own; raises ``StorageError`` for what went wrong."""
        self.written()
        self.read_ahead()
        assert self._read is not None
        (target, transfer), self._read = self._read, None
        transfer.wait()
        return target.untyped_storage()

    def __del__(self) -> None:
        slot = getattr(self, "_slot", None)
        if slot is not None:
            self._store.free(slot)


def is_whole(tensor: Tensor) -> bool:
    """Whether ``tensor``'s storage is a whole number of its elements."""
    return tensor.untyped_storage().nbytes() % tensor.element_size() == 0


def whole_storage(tensor: Tensor) -> Tensor | None:
    """``tensor``'s storage as a flat view; None where it is no whole number of elements.

    It shares the version counter of ``tensor``, by which a modification is found.
    """
    if not is_whole(tensor):
        return None
    num_elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((num_elements,), (1,), 0)
