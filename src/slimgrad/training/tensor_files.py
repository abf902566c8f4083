"""Safetensors files, written and read in pieces of a few MiB.

The safetensors library writes a file from tensors that are all in memory, and reads one through mapped pages,
which count as resident memory. A checkpoint of a budgeted run can afford neither: optimizer state kept in files
may be larger than memory. So the format (eight bytes of header length, a JSON header, the tensors' bytes) is
written and read here by explicit I/O; files are interchangeable with the library's.

Reference: the format at https://huggingface.co/docs/safetensors ("Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
from torch import Tensor

from slimgrad.errors import CheckpointError
from slimgrad.training import durable

PIECE_BYTES: Final = 4 * 2**20
MAX_HEADER_BYTES: Final = 100_000_000  # the library's own limit

_DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Chunked:
    """A tensor that is handed over in parts: ``chunks()`` yields its elements in row-major order, in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Tensor]]


Storable: TypeAlias = "Tensor | Chunked | StoredTensor"


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(cast("Any", flat.numpy())).cast("B")


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements of ``tensor`` in row-major order, as contiguous CPU tensors of at most ``PIECE_BYTES``."""
    tensor = tensor.detach()
    if tensor.is_contiguous() or tensor.dim() <= 1:
        flat = tensor.reshape(-1)
        length = max(1, PIECE_BYTES // tensor.element_size())
        for start in range(0, flat.numel(), length):
            yield flat[start : start + length].cpu().contiguous()
    elif tensor.numel() * tensor.element_size() <= PIECE_BYTES:
        yield tensor.cpu().contiguous().reshape(-1)
    else:
        for row in tensor:
            yield from pieces(row)


def _parts(source: Storable) -> Iterator[Tensor]:
    if isinstance(source, Tensor):
        yield from pieces(source)
    elif isinstance(source, Chunked):
        for chunk in source.chunks():
            yield from pieces(chunk)
    else:
        yield from source.parts()


def num_bytes(source: Storable) -> int:
    """The size of ``source`` in a file."""
    return math.prod(source.shape) * source.dtype.itemsize


def _header(tensors: Mapping[str, Storable]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, source in tensors.items():
        if source.dtype not in _NAMES:
            raise CheckpointError(
                f"cannot store {name!r}: safetensors files have no {source.dtype}; "
                "convert it, or leave it out of the checkpoint"
            )
        end = offset + num_bytes(source)
        entries[name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, tensors: Mapping[str, Storable]) -> tuple[int, str]:
    """Write ``tensors`` to the safetensors file ``path`` and wait for the disk; return its size and sha256.

    Holds at most ``PIECE_BYTES`` beside what a source's own chunks hold. Raises ``CheckpointError`` if a source
    yields another number of bytes, or another dtype, than it declares.
    """
    digest = hashlib.sha256()
    total = 0
    with path.open("wb", buffering=0) as file:
        header = _header(tensors)
        durable.write(file, header)
        digest.update(header)
        total += len(header)
        for name, source in tensors.items():
            written = 0
            for piece in _parts(source):
                _check_piece(name, source, piece)
                data = bytes_of(piece)
                durable.write(file, data)
                digest.update(data)
                written += data.nbytes
            if written != num_bytes(source):
                raise CheckpointError(
                    f"{name!r} declares {num_bytes(source):,} bytes ({source.dtype}, "
                    f"{tuple(source.shape)}) but its chunks gave {written:,}"
                )
            total += written
        durable.sync(file)
    return total, digest.hexdigest()


def _check_piece(name: str, source: Storable, piece: Tensor) -> None:
    if piece.dtype != source.dtype:
        raise CheckpointError(f"{name!r} declares {source.dtype} but a chunk is {piece.dtype}")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, its bytes at ``offset`` from the file's start."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def read_into(self, out: Tensor, start: int = 0) -> None:
        """Fill ``out`` with the elements from the flat index ``start`` on, in row-major order.

        Any device and any strides; a contiguous CPU tensor is filled without a copy in between. Raises
        ``CheckpointError`` if the dtypes differ, or the file has fewer elements.
        """
        if out.dtype != self.dtype or start < 0 or start + out.numel() > self.num_elements:
            raise CheckpointError(
                f"{self.name!r} of {self.path} is {self.dtype} with {self.num_elements:,} elements; "
                f"asked for elements {start:,} to {start + out.numel():,} as {out.dtype}"
            )
        with torch.no_grad(), self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            self._fill(file, out.detach())

    def _fill(self, file: Any, out: Tensor) -> None:
        if out.is_contiguous() and out.device.type == "cpu":
            self._read_exactly(file, bytes_of(out))
        elif out.numel() * out.element_size() <= PIECE_BYTES:
            staging = torch.empty(out.shape, dtype=out.dtype)
            self._read_exactly(file, bytes_of(staging))
            out.copy_(staging)
        elif out.is_contiguous() or out.dim() == 1:
            for part in out.view(-1).split(max(1, PIECE_BYTES // out.element_size())):
                self._fill(file, part)
        else:
            for row in out:
                self._fill(file, row)

    def _read_exactly(self, file: Any, view: memoryview) -> None:
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.path} ends inside {self.name!r}: it was cut short")
            view = view[count:]

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        out = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(out)
        return out

    def parts(self) -> Iterator[Tensor]:
        """Its elements in row-major order, in flat parts of at most ``PIECE_BYTES``."""
        length = max(1, PIECE_BYTES // self.dtype.itemsize)
        for start in range(0, self.num_elements, length):
            part = torch.empty(min(length, self.num_elements - start), dtype=self.dtype)
            self.read_into(part, start)
            yield part


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """What lies in the safetensors file ``path``; reads the header alone.

    Raises ``CheckpointError`` if the header does not agree with the file's size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            (length,) = struct.unpack("<Q", prefix) if len(prefix) == 8 else (size,)
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} claims a header of {length:,} bytes in {size:,}")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error})") from error


def _entry(path: Path, name: str, entry: dict[str, Any], start: int, size: int) -> StoredTensor:
    dtype = _DTYPES[entry["dtype"]]
    shape = tuple(int(n) for n in cast("list[int]", entry["shape"]))
    begin, end = entry["data_offsets"]
    stored = StoredTensor(path, name, dtype, shape, start + begin)
    if min((begin, *shape)) < 0 or end - begin != num_bytes(stored) or start + end > size:
        raise ValueError(f"{name!r} does not fit: bytes {begin} to {end} as {dtype} of {shape}")
    return stored
