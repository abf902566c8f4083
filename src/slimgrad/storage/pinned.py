"""Storage in pinned host memory, with copies on a CUDA stream of their own."""

from __future__ import annotations

import threading
from collections import deque
from typing import final

import torch
from torch import Tensor

from slimgrad.errors import StorageError
from slimgrad.storage.store import (
    MAX_PENDING_BYTES,
    MODIFIED,
    PAGE_BYTES,
    Slot,
    Store,
    Transfer,
    check_transfer,
    version_of,
)


@final
class _StreamTransfer(Transfer):
    def __init__(self, event: torch.cuda.Event, tensor: Tensor, *, is_write: bool) -> None:
        self._event = event
        self._device = tensor.device
        self._tensor: Tensor | None = tensor if is_write else None
        self._version = version_of(tensor)
        self._was_modified = False

    @property
    def is_done(self) -> bool:
        return self._event.query()

    def settle(self) -> None:
        self._event.synchronize()
        self._release()

    def _release(self) -> None:
        if self._tensor is not None:
            self._was_modified = version_of(self._tensor) != self._version
            self._tensor = None

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)
        self._release()
        if self._was_modified:
            raise StorageError(MODIFIED)


@final
class PinnedStore(Store):
    """Pinned host memory, each slot allocated once and used again, with copies on a CUDA stream of their own.

    ``Transfer.wait`` makes the current stream wait; it does not block the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._memory: dict[Slot, Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._returned: deque[Slot] = deque()
        self._pending: deque[tuple[_StreamTransfer, int]] = deque()
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._is_open = True

    def allocate(self, num_bytes: int) -> Slot:
        """A slot in pinned memory: a freed one of the same number of pages, or a new one."""
        self._check_open()
        size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        with self._lock:
            while self._returned:
                memory = self._memory.pop(self._returned.popleft())
                self._free.setdefault(memory.numel(), []).append(memory)
            freed = self._free.get(size)
            memory = freed.pop() if freed else torch.empty(size, dtype=torch.uint8, pin_memory=True)
            slot = Slot(0, num_bytes)
            self._memory[slot] = memory
            return slot

    def free(self, slot: Slot) -> None:
        """Give ``slot`` back; a second time does nothing."""
        if slot.is_live:
            slot.is_live = False
            self._returned.append(slot)

    def start_write(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Copy ``tensor`` to the host on the store's stream; see ``Store``."""
        self._check_open()
        num_bytes = check_transfer(slot, tensor, offset_bytes, self.device)
        with self._lock:
            while self._pending and (
                self._pending[0][0].is_done or self._pending_bytes + num_bytes > MAX_PENDING_BYTES
            ):
                transfer, done_bytes = self._pending.popleft()
                transfer.settle()
                self._pending_bytes -= done_bytes
            place = self._memory[slot][offset_bytes : offset_bytes + num_bytes]
            event = self._copy(place, _bytes_of(tensor), tensor)
            transfer = _StreamTransfer(event, tensor, is_write=True)
            self._pending.append((transfer, num_bytes))
            self._pending_bytes += num_bytes
            return transfer

    def start_read(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Copy from the host into ``tensor`` on the store's stream; see ``Store``."""
        self._check_open()
        num_bytes = check_transfer(slot, tensor, offset_bytes, self.device)
        place = self._memory[slot][offset_bytes : offset_bytes + num_bytes]
        # .data has a version counter of its own: a buffer may be read into while its last write is checked
        event = self._copy(_bytes_of(tensor.data), place, tensor)
        return _StreamTransfer(event, tensor, is_write=False)

    def _copy(self, target: Tensor, source: Tensor, on_device: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        on_device.record_stream(self._stream)
        return event

    def _check_open(self) -> None:
        if not self._is_open:
            raise StorageError("this store is closed: open another")

    def close(self) -> None:
        """Finish what was started and give the pinned memory back."""
        if self._is_open:
            self._stream.synchronize()
            self._is_open = False
            self._memory.clear()
            self._free.clear()
            self._pending.clear()


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
