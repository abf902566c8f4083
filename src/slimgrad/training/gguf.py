"""Validates the header of a GGUF file before anything reads it.

Readers of GGUF follow the counts and lengths that they find; on a damaged file some never end. ``validate_gguf``
walks the header once, holds every count and length against the bytes that are there, and reads no tensor. A file
that passes can be handed to any reader.

References: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("File Structure").
*departs:* little-endian files of versions 2 and 3 only; arrays nest at most four deep; the number of array
elements and of tensors is capped (far above any published model), since readers spend microseconds on each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from slimgrad.errors import GgufError

Scalar = int | float | bool | str

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_KEY_BYTES: Final = 2**16 - 1
MAX_NAME_BYTES: Final = 64
MAX_STRING_BYTES: Final = 2**24
MAX_DIMS: Final = 8
MAX_DEPTH: Final = 4
MAX_ELEMENTS: Final = 2**22
MAX_TENSORS: Final = 2**17
MAX_KEYS: Final = 2**16
MIN_KEY_BYTES: Final = 8 + 1 + 4 + 1  # length, one character, type, a one-byte value
MIN_TENSOR_BYTES: Final = 8 + 1 + 4 + 4 + 8  # length, one character, n_dims, type, offset

BOOL, STRING, ARRAY = 7, 8, 9
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip

# id: (name, elements in a block, bytes of a block)
GGML_TYPES: Final[dict[int, tuple[str, int, int]]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 20: ("IQ4_NL", 32, 18), 39: ("MXFP4", 32, 17),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies: ``shape`` as stored (fastest dimension first), ``offset`` from the file's start."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A header that agrees with its file. ``metadata`` holds the single values; arrays are checked, not kept."""

    version: int
    architecture: str
    alignment: int
    data_offset: int
    metadata: dict[str, Scalar]
    tensors: tuple[GgufTensor, ...]


class _Cursor:
    """Reads forward through a file and never past its end."""

    def __init__(self, file: BinaryIO, path: Path, num_bytes: int) -> None:
        self.file = file
        self.path = path
        self.num_bytes = num_bytes
        self.position = 0
        self.elements = 0

    @property
    def remaining(self) -> int:
        return self.num_bytes - self.position

    def fail(self, what: str, *, at: int | None = None) -> GgufError:
        place = self.position if at is None else at
        return GgufError(
            f"{self.path} is not a usable GGUF file: at byte {place:,} of {self.num_bytes:,}, {what}; "
            "the file is damaged or incomplete: get it again from its source"
        )

    def _beyond(self, num_bytes: int, what: str) -> GgufError:
        return self.fail(f"{what} needs {num_bytes:,} bytes, but {self.remaining:,} are left")

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self.remaining:
            raise self._beyond(num_bytes, what)
        data = self.file.read(num_bytes)
        if len(data) != num_bytes:
            raise self.fail(f"{what} could not be read whole: {len(data):,} of {num_bytes:,} bytes")
        self.position += num_bytes
        return data

    def skip(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.remaining:
            raise self._beyond(num_bytes, what)
        self.position += num_bytes
        self.file.seek(self.position)

    def u32(self, what: str) -> int:
        return struct.unpack("<I", self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return struct.unpack("<Q", self.take(8, what))[0]

    def string(self, what: str, limit: int = MAX_STRING_BYTES, encoding: str = "utf-8") -> str:
        at = self.position
        length = self.u64(f"the length of {what}")
        most = min(limit, self.remaining)
        if length > most:
            raise self.fail(f"{what} claims {length:,} bytes, expected at most {most:,}", at=at)
        try:
            return self.take(length, what).decode(encoding)
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not {encoding} text ({error.reason})", at=at) from None


def _elements(cursor: _Cursor, kind: int, count: int, smallest_bytes: int, key: str) -> None:
    """Hold ``count`` array elements of at least ``smallest_bytes`` each against the bytes that are left."""
    if count * smallest_bytes > cursor.remaining:
        raise cursor.fail(
            f"the array {key!r} claims {count:,} elements of type {kind}, expected at most "
            f"{cursor.remaining // smallest_bytes:,} in the {cursor.remaining:,} bytes left"
        )
    cursor.elements += count
    if cursor.elements > MAX_ELEMENTS:
        raise cursor.fail(f"{key!r} brings the array elements above the limit of {MAX_ELEMENTS:,}")


def _skip_array(cursor: _Cursor, key: str, depth: int = 1) -> None:
    if depth > MAX_DEPTH:
        raise cursor.fail(f"the array {key!r} is nested more than {MAX_DEPTH} deep")
    kind = cursor.u32(f"the element type of {key!r}")
    count = cursor.u64(f"the length of {key!r}")
    if kind in _SCALARS:
        width = struct.calcsize(_SCALARS[kind])
        _elements(cursor, kind, count, width, key)
        if kind == BOOL:
            if cursor.take(count, f"the array {key!r}").strip(b"\x00\x01"):
                raise cursor.fail(f"the array {key!r} holds a truth value other than 0 and 1")
        else:
            cursor.skip(count * width, f"the array {key!r}")
    elif kind == STRING:
        _elements(cursor, kind, count, 8, key)
        for _ in range(count):
            cursor.string(f"a string of {key!r}")
    elif kind == ARRAY:
        _elements(cursor, kind, count, 12, key)
        for _ in range(count):
            _skip_array(cursor, key, depth + 1)
    else:
        raise cursor.fail(f"the array {key!r} has the unknown element type {kind}, expected 0-12")


def _scalar(cursor: _Cursor, kind: int, key: str) -> Scalar:
    layout = _SCALARS[kind]
    (value,) = struct.unpack(layout, cursor.take(struct.calcsize(layout), f"the value of {key!r}"))
    if kind == BOOL and value not in (0, 1):
        raise cursor.fail(f"{key!r} is a truth value of {value}, expected 0 or 1")
    return bool(value) if kind == BOOL else value


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Scalar]:
    metadata: dict[str, Scalar] = {}
    kinds: dict[str, int] = {}
    for _ in range(count):
        at = cursor.position
        key = cursor.string("a metadata key", MAX_KEY_BYTES, "ascii")
        if not key or key in kinds or key.startswith("GGUF."):
            raise cursor.fail(f"the metadata key {key!r} is empty, reserved or repeated", at=at)
        kinds[key] = kind = cursor.u32(f"the type of {key!r}")
        if kind == STRING:
            metadata[key] = cursor.string(f"the value of {key!r}")
        elif kind == ARRAY:
            _skip_array(cursor, key)
        elif kind in _SCALARS:
            metadata[key] = _scalar(cursor, kind, key)
        else:
            raise cursor.fail(f"{key!r} has the unknown value type {kind}, expected 0-12")
    if kinds.get("general.architecture") != STRING or not metadata["general.architecture"]:
        raise cursor.fail("the metadata has no text under 'general.architecture'")
    if kinds.get("general.alignment", 4) != 4:
        raise cursor.fail("'general.alignment' is not an unsigned 32-bit number")
    return metadata


def _read_tensor(cursor: _Cursor) -> GgufTensor:
    """One tensor's entry; ``offset`` still counts from the start of the data."""
    at = cursor.position
    name = cursor.string("a tensor's name", MAX_NAME_BYTES)
    num_dims = cursor.u32(f"the number of dimensions of {name!r}")
    if not name or num_dims > MAX_DIMS:
        raise cursor.fail(
            f"tensor {name!r} claims {num_dims} dimensions, expected a name and at most {MAX_DIMS}",
            at=at,
        )
    shape = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, f"the shape of {name!r}"))
    kind = cursor.u32(f"the type of {name!r}")
    offset = cursor.u64(f"the offset of {name!r}")
    if kind not in GGML_TYPES:
        raise cursor.fail(f"tensor {name!r} has the unknown or removed ggml type {kind}", at=at)
    type_name, block, block_bytes = GGML_TYPES[kind]
    row = shape[0] if shape else 1
    if not all(shape) or row % block:
        raise cursor.fail(
            f"tensor {name!r} has shape {shape}, expected no zero and, for {type_name}, a first "
            f"dimension that is a multiple of {block}",
            at=at,
        )
    num_elements = 1
    for size in shape:
        num_elements *= size
    return GgufTensor(name, type_name, shape, offset, num_elements // block * block_bytes)


def _check_places(cursor: _Cursor, tensors: list[GgufTensor], alignment: int, start: int) -> None:
    """Names are unique; every tensor is aligned, inside the file and apart from the others."""
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise cursor.fail("two tensors have the same name")
    end, previous = 0, ""
    for tensor in sorted(tensors, key=lambda t: t.offset):
        place = f"tensor {tensor.name!r} at data offset {tensor.offset:,}"
        if tensor.offset % alignment:
            raise cursor.fail(f"{place} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise cursor.fail(f"{place} overlaps {previous!r}, which ends at {end:,}")
        end, previous = tensor.offset + tensor.num_bytes, tensor.name
        if start + end > cursor.num_bytes:
            raise cursor.fail(
                f"{place} ends at byte {start + end:,}, expected at most {cursor.num_bytes:,}"
            )


def _check_count(cursor: _Cursor, count: int, smallest_bytes: int, limit: int, what: str) -> None:
    most = min(limit, cursor.remaining // smallest_bytes)
    if count > most:
        raise cursor.fail(f"the header claims {count:,} {what}, expected at most {most:,}")


def _validate(cursor: _Cursor) -> GgufHeader:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise cursor.fail(f"the magic number is {magic!r}, expected {MAGIC!r}", at=0)
    version = cursor.u32("the version")
    if version not in VERSIONS:
        order = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise cursor.fail(f"the version is {version}{order}, expected 2 or 3, little-endian", at=4)
    num_tensors = cursor.u64("the number of tensors")
    num_keys = cursor.u64("the number of metadata keys")
    _check_count(cursor, num_keys, MIN_KEY_BYTES, MAX_KEYS, "metadata keys")
    _check_count(cursor, num_tensors, MIN_TENSOR_BYTES, MAX_TENSORS, "tensors")
    metadata = _read_metadata(cursor, num_keys)
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    if alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"the alignment is {alignment}, expected a power of two")
    _check_count(cursor, num_tensors, MIN_TENSOR_BYTES, MAX_TENSORS, "tensors")
    tensors = [_read_tensor(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    _check_places(cursor, tensors, alignment, start)
    placed = (
        GgufTensor(t.name, t.type_name, t.shape, start + t.offset, t.num_bytes) for t in tensors
    )
    architecture = str(metadata["general.architecture"])
    return GgufHeader(version, architecture, alignment, start, metadata, tuple(placed))


def validate_gguf(path: str | Path) -> GgufHeader:
    """Check that the header of the GGUF file at ``path`` agrees with the file, and return it.

    Reads the header alone, in time and memory bounded by its size. Raises ``GgufError`` with the place in the
    file, what was expected and what was found.
    """
    path = Path(path)
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            return _validate(_Cursor(file, path, num_bytes))
    except OSError as error:
        reason = error.strerror or str(error)
        raise GgufError(
            f"cannot read {path} ({reason}): expected a GGUF model file there"
        ) from error
