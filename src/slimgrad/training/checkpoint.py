"""Checkpoints that a crash cannot tear: generation directories, checked on the way out and on the way in.

    runs/checkpoints/
      gen-00000011/                  the generation before, kept
      gen-00000012/
        model-00001.safetensors      parameters and buffers, tied ones once
        optimizer-00001.safetensors  the optimizer's tensors
        state.json                   everything else, and the size and sha256 of each file
        COMMITTED                    the sha256 of state.json: without it there is no checkpoint here

A generation is written under a temporary name, each file and the folder brought to disk, then renamed, and only
then marked as committed; older ones go after that. Whenever the process dies, the newest committed generation is
whole. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from slimgrad.errors import CheckpointError
from slimgrad.training import durable
from slimgrad.training.generation import (
    FORMAT,
    GENERATION,
    MARKER,
    STATE,
    Checkpoint,
    committed,
    damage_of,
    generations,
    number_of,
    open_generation,
)
from slimgrad.training.plain_values import encode
from slimgrad.training.tensor_files import Storable, num_bytes, write_tensors

__all__ = ["Checkpoint", "CheckpointState", "latest", "load_checkpoint", "save_checkpoint"]

SHARD_BYTES: Final = 2 * 2**30
_LEFTOVER: Final = re.compile(r"^\.(tmp|old)-gen-\d{8,}")


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint is made of.

    ``model`` and ``optimizer`` map names to tensors, or to sources that hand a tensor over in parts. ``values``
    is anything that has a plain form: numbers, text, lists, tuples, dictionaries, small tensors and arrays.
    """

    step: int
    model: Mapping[str, Storable]
    optimizer: Mapping[str, Storable] = field(default_factory=dict[str, Storable])
    values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fingerprint: str | None = None


def save_checkpoint(folder: str | Path, state: CheckpointState, *, keep: int = 2) -> Path:
    """Write ``state`` as the next generation in ``folder``, and return the generation's folder.

    The last ``keep`` generations stay. Tensors go to disk in parts of a few MiB. One process may write to a
    folder at a time. Raises ``CheckpointError`` if it cannot be written, with the older generations untouched.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least the new generation must be kept")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        number = max((number_of(path) for path in generations(folder)), default=0) + 1
        temporary = folder / f".tmp-gen-{number:08d}-{os.getpid()}"
        try:
            generation = _write_generation(temporary, folder / f"gen-{number:08d}", state)
        except Exception:
            durable.remove_tree(temporary)
            raise
    except OSError as error:
        raise CheckpointError(
            f"could not write a checkpoint of step {state.step} to {folder} ({error}); "
            "what was there before is untouched: free space or choose another folder"
        ) from error
    with suppress(OSError):  # the new generation counts already; the next save tries again
        _prune(folder, generation, keep)
    return generation


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The newest committed generation in ``folder`` (or the generation ``folder`` itself), checked byte by byte.

    Raises ``CheckpointError`` if there is none, or if it is damaged: it names the file, what was expected and
    found, and the newest older generation that is whole. That one is loaded only if asked for by its path.
    """
    folder = Path(folder)
    if GENERATION.match(folder.name) and folder.is_dir():
        return open_generation(folder)
    found = committed(folder)
    if not found:
        raise CheckpointError(
            f"no checkpoint in {folder}: expected a folder gen-00000001 or later with the file {MARKER}"
        )
    try:
        return open_generation(found[0])
    except CheckpointError as error:
        older = next((path for path in found[1:] if damage_of(path) is None), None)
        advice = (
            f"the older generation {older} is whole: load it by this path to continue from there"
            if older
            else "no older generation is whole"
        )
        raise CheckpointError(f"{error}; {advice}") from error


def latest(folder: str | Path) -> Path | None:
    """The newest whole generation in ``folder``, or None. Warns of each damaged one that is passed over."""
    for path in committed(Path(folder)):
        damage = damage_of(path)
        if damage is None:
            return path
        warnings.warn(f"passed over a damaged checkpoint: {damage}", RuntimeWarning, stacklevel=2)
    return None


def _shards(
    prefix: str, tensors: Mapping[str, Storable]
) -> Iterator[tuple[str, dict[str, Storable]]]:
    """File names and what goes into each: a new file wherever the next tensor would exceed ``SHARD_BYTES``."""
    shard: dict[str, Storable] = {}
    size, count = 0, 1
    for name, source in tensors.items():
        if shard and size + num_bytes(source) > SHARD_BYTES:
            yield f"{prefix}-{count:05d}.safetensors", shard
            shard, size, count = {}, 0, count + 1
        shard[name] = source
        size += num_bytes(source)
    yield f"{prefix}-{count:05d}.safetensors", shard


def _versions() -> dict[str, str]:
    try:
        own = version("slimgrad")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "slimgrad": own,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _write_generation(temporary: Path, final: Path, state: CheckpointState) -> Path:
    durable.remove_tree(temporary)
    temporary.mkdir()
    files: dict[str, dict[str, Any]] = {}
    for prefix, tensors in (("model", state.model), ("optimizer", state.optimizer)):
        for name, shard in _shards(prefix, tensors):
            size, digest = write_tensors(temporary / name, shard)
            files[name] = {"bytes": size, "sha256": digest}
    document = {
        "format": FORMAT,
        "step": state.step,
        "fingerprint": state.fingerprint,
        "versions": _versions(),
        "files": files,
        "values": encode(dict(state.values), "values"),
    }
    text = json.dumps(document, indent=1).encode()
    durable.write_file(temporary / STATE, text)
    durable.sync_folder(temporary)
    durable.rename(temporary, final)
    durable.sync_folder(final.parent)
    durable.write_file(final / f"{MARKER}.tmp", hashlib.sha256(text).hexdigest().encode())
    durable.rename(final / f"{MARKER}.tmp", final / MARKER)
    durable.sync_folder(final)
    return final


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the last ``keep`` whole generations, and what killed runs left behind.

    A generation loses its name before its files: one that is half removed is never taken for a damaged one.
    """
    older = [path for path in committed(folder) if path != newest]
    whole = [path for path in older if damage_of(path, content=False) is None]
    kept = [newest, *whole[: keep - 1]]
    for path in generations(folder):
        if path not in kept:
            durable.rename(path, folder / f".old-{path.name}-{os.getpid()}")
    for path in folder.iterdir():
        if _LEFTOVER.match(path.name):
            durable.remove_tree(path)
