"""One generation of a checkpoint on disk: its name, its commit marker, and whether every byte is as written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from slimgrad.errors import CheckpointError
from slimgrad.training.plain_values import decode
from slimgrad.training.tensor_files import PIECE_BYTES, StoredTensor, open_tensors

FORMAT: Final = 1
MARKER: Final = "COMMITTED"
STATE: Final = "state.json"
GENERATION: Final = re.compile(r"^gen-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A whole generation, every byte of it checked. Its tensors are still on disk."""

    path: Path
    step: int
    model: Mapping[str, StoredTensor]
    optimizer: Mapping[str, StoredTensor]
    values: Mapping[str, Any]
    fingerprint: str | None
    versions: Mapping[str, str]


def generations(folder: Path) -> list[Path]:
    """Generations, committed or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if GENERATION.match(path.name) and path.is_dir()]
    return sorted(found, key=number_of, reverse=True)


def number_of(generation: Path) -> int:
    """The number in the folder's name; 0 for any other folder."""
    match = GENERATION.match(generation.name)
    return int(match[1]) if match else 0


def committed(folder: Path) -> list[Path]:
    """Generations with a commit marker, the newest first."""
    return [path for path in generations(folder) if (path / MARKER).exists()]


def damage_of(generation: Path, *, content: bool = True) -> CheckpointError | None:
    """What is wrong with a committed generation. Without ``content``, the tensor files' sizes alone are checked."""
    try:
        if content:
            open_generation(generation)
        else:
            _check_files(generation, _read_state(generation), content=False)
    except CheckpointError as error:
        return error
    return None


def _read_state(generation: Path) -> dict[str, Any]:
    marker, path = generation / MARKER, generation / STATE
    try:
        expected = marker.read_bytes()
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename} cannot be read ({error.strerror}): {generation} is not a whole checkpoint"
        ) from error
    found = hashlib.sha256(text).hexdigest().encode()
    if found != expected:
        raise CheckpointError(
            f"{path} does not agree with {marker}: expected sha256 {expected.decode(errors='replace')}, "
            f"found {found.decode()} ({len(text):,} bytes); one of the two was cut short or altered"
        )
    document: dict[str, Any] = json.loads(text)
    if document.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is of format {document.get('format')}, expected {FORMAT}: "
            f"it was written by slimgrad {document.get('versions', {}).get('slimgrad')}"
        )
    return document


def _check_files(generation: Path, document: dict[str, Any], *, content: bool = True) -> None:
    for name, expected in document["files"].items():
        path = generation / Path(name).name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "no such file" if size is None else f"{size:,}"
            raise CheckpointError(
                f"{path} was cut short or altered: expected {expected['bytes']:,} bytes, found {found}"
            )
        digest = _sha256(path) if content else expected["sha256"]
        if digest != expected["sha256"]:
            raise CheckpointError(
                f"{path} was altered: expected sha256 {expected['sha256']}, found {digest}"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(PIECE_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def open_generation(generation: Path) -> Checkpoint:
    """Check every byte of a committed generation and open it; raises ``CheckpointError``."""
    try:
        return _read_generation(generation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{generation} cannot be read as a checkpoint ({error!r})") from error


def _read_generation(generation: Path) -> Checkpoint:
    document = _read_state(generation)
    _check_files(generation, document)
    tensors: dict[str, dict[str, StoredTensor]] = {"model": {}, "optimizer": {}}
    for name in document["files"]:
        tensors[name.partition("-")[0]].update(open_tensors(generation / name))
    return Checkpoint(
        path=generation,
        step=document["step"],
        model=tensors["model"],
        optimizer=tensors["optimizer"],
        values=decode(document["values"]),
        fingerprint=document["fingerprint"],
        versions=document["versions"],
    )
