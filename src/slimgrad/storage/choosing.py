"""Which store a device gets, and how fast it is."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slimgrad.errors import StorageError
from slimgrad.storage.files import FileStore
from slimgrad.storage.pinned import PinnedStore
from slimgrad.storage.store import Slot, Store, Transfer

if TYPE_CHECKING:
    from slimgrad.host import Host


def open_store(device: torch.device, folder: Path) -> Store:
    """The store for tensors of ``device``: pinned host memory for CUDA, a file in ``folder`` for the CPU."""
    if device.type == "cuda":
        return PinnedStore(device)
    if device.type == "cpu":
        return FileStore(folder)
    raise StorageError(
        f"expected a model on the CPU or on CUDA, found it on {device}: no store is known for it"
    )


_stores: weakref.WeakKeyDictionary[Host, weakref.ref[Store]] = weakref.WeakKeyDictionary()


def store_of(host: Host) -> Store:
    """The store that all methods attached to ``host`` share; it is closed when none of them holds it."""
    known = _stores.get(host)
    store = known() if known is not None else None
    if store is None:
        store = open_store(host.device, host.folder)
        _stores[host] = weakref.ref(store)
    return store


def measure_bandwidth(store: Store, num_bytes: int = 32 * 2**20) -> tuple[float, float]:
    """Bytes per second ``(read, written)`` of ``store``, medians of three transfers of ``num_bytes``.

    Files are read through the system's page cache, as they will be in training.
    """
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=store.device)
    slot = store.allocate(num_bytes)
    store.write(slot, tensor)  # the first write makes the pages
    rates: list[float] = []
    for start in (store.start_read, store.start_write):
        seconds = [_timed(store, start, slot, tensor) for _ in range(3)]
        rates.append(num_bytes / max(statistics.median(seconds), 1e-9))
    store.free(slot)
    return rates[0], rates[1]


def _timed(
    store: Store, start: Callable[[Slot, Tensor], Transfer], slot: Slot, tensor: Tensor
) -> float:
    began = time.perf_counter()
    start(slot, tensor).wait()
    if store.device.type == "cuda":
        torch.cuda.synchronize(store.device)
    return time.perf_counter() - began
