"""The resident memory of this process: what the system sees, beside what the ledger counts."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import psutil

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def resident_bytes() -> int:
    """Bytes resident now."""
    return int(psutil.Process().memory_info().rss)


def high_water_bytes() -> int | None:
    """The most bytes resident since the start or the last ``reset_high_water``; None where the system does not tell."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_high_water() -> bool:
    """Let the high-water mark start again from what is resident now; False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
        return True
    except OSError:
        return False


def release_memory() -> None:
    """Give what is free to the system (with glibc; other C libraries keep it or not as they like)."""
    gc.collect()
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def return_freed_memory(threshold_bytes: int = 1 << 18) -> None:
    """Let the C library give large freed blocks back to the system at once (Linux; elsewhere nothing happens).

    glibc raises its own threshold as large blocks are freed, after which freed tensors stay resident and the
    resident size no longer tells what is in use. Fresh pages cost time; with a larger threshold more of the resident
    memory is fragments.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, max(threshold_bytes, 1 << 20))
    release_memory()


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") else None
