"""Storage in a file, by explicit reads and writes straight from and into a tensor's memory."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import tempfile
import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, final

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

_LARGEST_CALL = 2**30  # Linux moves at most 2 GiB less a page in one call

_Call: TypeAlias = Callable[[int, list[memoryview], int], int]  # os.preadv or os.pwritev


@final
class _FileTransfer(Transfer):
    def __init__(self, call: _Call, tensor: Tensor, num_bytes: int, position: int) -> None:
        self._call = call
        self._tensor: Tensor | None = tensor
        self._version = version_of(tensor)
        self._address = tensor.data_ptr()
        self._num_bytes = num_bytes
        self._position = position
        self._error: StorageError | None = None
        self._done = threading.Event()

    def run(self, fd: int) -> None:
        """Move the bytes; called on the worker thread, where no tensor may be made."""
        try:
            _move(self._call, fd, self._address, self._num_bytes, self._position)
            if self._tensor is not None and version_of(self._tensor) != self._version:
                raise StorageError(MODIFIED)
        except StorageError as error:
            self._error = error.with_traceback(None)
        except Exception as error:
            self._error = StorageError(f"cannot move bytes to or from the store: {error}")
        finally:
            self._tensor = None
            self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def settle(self) -> None:
        """Wait without raising: the error is for whoever waits for this transfer."""
        self._done.wait()

    def wait(self) -> None:
        self._done.wait()
        if self._error is not None:
            raise StorageError(str(self._error)) from self._error.__cause__


def _move(call: _Call, fd: int, address: int, num_bytes: int, position: int) -> None:
    if num_bytes == 0:
        return
    memory = memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")
    done = 0
    while done < num_bytes:
        try:
            moved = call(fd, [memory[done : done + _LARGEST_CALL]], position + done)
        except OSError as error:
            raise _explained(error, num_bytes) from error
        if moved == 0:
            raise StorageError(
                f"expected {num_bytes} bytes at byte {position} of the store's file, found {done}: the file was "
                "cut short by something else; the step cannot go on, resume from a checkpoint"
            )
        done += moved


def _explained(error: OSError, num_bytes: int) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageError(
            f"no space left for {num_bytes} more bytes in the folder of the offloaded tensors ({error.strerror}): "
            "free some, or name another folder"
        )
    return StorageError(f"the file of the offloaded tensors cannot be used: {error}")


def _work(jobs: queue.SimpleQueue[_FileTransfer | None], fd: int) -> None:
    """The worker: runs transfers in order until it gets None, then closes the file. Holds nothing while idle."""
    while True:
        job = jobs.get()
        if job is None:
            os.close(fd)
            return
        job.run(fd)
        del job


def _dismiss(jobs: queue.SimpleQueue[_FileTransfer | None], fd: int, pid: int) -> None:
    if os.getpid() == pid:
        jobs.put(None)
    else:
        os.close(fd)  # a forked child has the file, but not the thread


@final
class FileStore(Store):
    """One file in ``folder``, unlinked as soon as it is open, so that even a killed process leaves nothing behind.

    Bytes go from and into a CPU tensor's own memory by ``os.pwritev`` and ``os.preadv`` on one worker thread,
    which never makes a tensor. Raises ``StorageError`` where the folder cannot be written, is full, or the file
    was cut short, and in a forked child, which has no worker.
    """

    def __init__(self, folder: Path) -> None:
        self.device = torch.device("cpu")
        try:
            self._fd, name = tempfile.mkstemp(prefix="offload-", dir=folder)
            Path(name).unlink()
        except OSError as error:
            raise StorageError(
                f"cannot make a file in {folder}: {error}; name another folder"
            ) from error
        self._pid = os.getpid()
        self._jobs: queue.SimpleQueue[_FileTransfer | None] = queue.SimpleQueue()
        self._pending: deque[tuple[_FileTransfer, int]] = deque()
        self._pending_bytes = 0
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = []  # (position, bytes), sorted, no two adjacent
        self._returned: deque[Slot] = (
            deque()
        )  # a slot may be freed by the garbage collector, anywhere
        self._worker = threading.Thread(target=_work, args=(self._jobs, self._fd), daemon=True)
        self._worker.start()
        self._dismiss = weakref.finalize(self, _dismiss, self._jobs, self._fd, self._pid)
        self.file_bytes = 0

    def fileno(self) -> int:
        """The open file's descriptor."""
        self._check_open()
        return self._fd

    def allocate(self, num_bytes: int) -> Slot:
        """A slot of whole pages: the smallest free extent that fits, or the file grows."""
        self._check_open()
        size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        with self._lock:
            while self._returned:
                self._take_back(self._returned.popleft())
            fitting = [extent for extent in self._free if extent[1] >= size]
            if not fitting:
                return Slot(self._grow(size), num_bytes)
            position, free_bytes = min(fitting, key=lambda extent: extent[1])
            self._free.remove((position, free_bytes))
            if free_bytes > size:
                insort(self._free, (position + size, free_bytes - size))
            return Slot(position, num_bytes)

    def _grow(self, size: int) -> int:
        position = self.file_bytes
        if size and hasattr(
            os, "posix_fallocate"
        ):  # a full disk is better found now than in mid-step
            try:
                os.posix_fallocate(self._fd, position, size)
            except OSError as error:
                raise _explained(error, size) from error
        self.file_bytes += size
        return position

    def _take_back(self, slot: Slot) -> None:
        start, size = slot.position, -(-slot.num_bytes // PAGE_BYTES) * PAGE_BYTES
        for position, num_bytes in list(self._free):
            if position + num_bytes == start:
                start, size = position, num_bytes + size
            elif start + size == position:
                size += num_bytes
            else:
                continue
            self._free.remove((position, num_bytes))
        if size:
            insort(self._free, (start, size))

    def free(self, slot: Slot) -> None:
        """Give ``slot`` back; a second time does nothing."""
        if slot.is_live:
            slot.is_live = False
            self._returned.append(slot)

    def start_write(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Write ``tensor`` on the worker thread; see ``Store``."""
        return self._start(os.pwritev, slot, tensor, offset_bytes)

    def start_read(self, slot: Slot, tensor: Tensor, offset_bytes: int = 0) -> Transfer:
        """Fill ``tensor`` on the worker thread; see ``Store``."""
        return self._start(os.preadv, slot, tensor, offset_bytes)

    def _start(self, call: _Call, slot: Slot, tensor: Tensor, offset_bytes: int) -> _FileTransfer:
        self._check_open()
        num_bytes = check_transfer(slot, tensor, offset_bytes, self.device)
        transfer = _FileTransfer(call, tensor, num_bytes, slot.position + offset_bytes)
        with self._lock:
            if call is os.pwritev:
                self._make_room(num_bytes)
                self._pending.append((transfer, num_bytes))
                self._pending_bytes += num_bytes
            self._jobs.put(transfer)
        return transfer

    def _make_room(self, num_bytes: int) -> None:
        while self._pending and (
            self._pending[0][0].is_done or self._pending_bytes + num_bytes > MAX_PENDING_BYTES
        ):
            transfer, done_bytes = self._pending.popleft()
            transfer.settle()
            self._pending_bytes -= done_bytes

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise StorageError(
                f"this store belongs to process {self._pid}, and a forked child cannot use it: apply in the child"
            )
        if not self._dismiss.alive:
            raise StorageError("this store is closed: open another")

    def close(self) -> None:
        """Finish what was started, end the worker and give the file's space back."""
        self._dismiss()
        if os.getpid() == self._pid and threading.current_thread() is not self._worker:
            self._worker.join()
