"""Writes that survive a crash: data reaches the disk before the name that makes it count.

Every effect on the disk goes through one of these functions, so that a test can make each of them fail in turn.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import BinaryIO


def write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of ``data``, in as many system calls as it takes."""
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view) :]


def sync(file: BinaryIO) -> None:
    """Return once the bytes of ``file`` are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once the names in ``folder`` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give ``old`` its final name in one step; an existing file is replaced, a non-empty folder is an error."""
    old.replace(new)


def remove_tree(folder: Path) -> None:
    """Delete a folder that no longer counts; what cannot be deleted is left for the next time."""
    shutil.rmtree(folder, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` and wait for the disk."""
    with path.open("wb", buffering=0) as file:
        write(file, data)
        sync(file)
