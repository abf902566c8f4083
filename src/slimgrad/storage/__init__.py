"""Storage outside the device: what methods write device tensors to, and read them back from.

One small interface, ``Store``, and two implementations: ``FileStore`` (for the CPU: one unlinked file, explicit
reads and writes straight from and into a tensor's memory) and ``PinnedStore`` (for CUDA: pinned host memory,
copies on a stream of their own). Transfers of one store run one after the other in the order in which they were
started: a read started after a write of the same slot sees what was written, and a slot may be freed and used
again while transfers on it are still under way.
"""

from slimgrad.storage.choosing import measure_bandwidth, open_store, store_of
from slimgrad.storage.files import FileStore
from slimgrad.storage.pinned import PinnedStore
from slimgrad.storage.store import (
    MAX_PENDING_BYTES,
    Slot,
    Store,
    Transfer,
    dense_view,
    flat_like,
    same_order,
)

__all__ = [
    "MAX_PENDING_BYTES",
    "FileStore",
    "PinnedStore",
    "Slot",
    "Store",
    "Transfer",
    "dense_view",
    "flat_like",
    "measure_bandwidth",
    "open_store",
    "same_order",
    "store_of",
]
