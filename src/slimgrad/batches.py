"""Batches as users have them: tensors, tuples, dicts, mappings such as ``BatchEncoding``, dataclasses, nested."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from slimgrad.errors import BatchError

Shapes: TypeAlias = dict[str, tuple[str, tuple[int, ...]]]
"""Every tensor of a batch by its path: its dtype and its shape."""


def map_named(function: Callable[[str, Tensor], Any], batch: Any, path: str = "") -> Any:
    """``batch`` with every tensor replaced by ``function(path, tensor)``, paths as in ``named_tensors``."""
    prefix = f"{path}." if path else ""
    if isinstance(batch, Tensor):
        return function(path, batch)
    if isinstance(batch, Mapping):
        members = {k: map_named(function, v, f"{prefix}{k}") for k, v in batch.items()}
        return type(batch)(members) if isinstance(batch, dict) else members
    if isinstance(batch, (list, tuple)):
        made = [map_named(function, v, f"{prefix}{i}") for i, v in enumerate(batch)]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        made = {k: map_named(function, v, f"{prefix}{k}") for k, v in values.items()}
        return type(batch)(**made)
    return batch


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """``batch`` with ``function`` applied to every tensor; other leaves and the kinds of containers are kept."""
    return map_named(lambda _, tensor: function(tensor), batch)


def named_tensors(batch: Any) -> dict[str, Tensor]:
    """Every tensor of ``batch`` by its path: ``"labels"``, ``"0.input_ids"``; ``""`` where the batch is one."""
    found: dict[str, Tensor] = {}
    map_named(lambda path, tensor: found.setdefault(path, tensor), batch)
    return found


def batch_size(batch: Any) -> int:
    """The length that the first dimensions of all tensors agree on; 0 where they do not, or there are none."""
    sizes = {t.shape[0] if t.dim() else 0 for t in named_tensors(batch).values()}
    return sizes.pop() if len(sizes) == 1 else 0


def narrow(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start`` to ``stop`` of a batch: views along the first dimension of every tensor."""
    return map_tensors(lambda t: t[start:stop], batch)


def _numpy_hint(batch: Any) -> str:
    members = list(batch.values()) if isinstance(batch, Mapping) else batch
    leaves = [batch, *(members if isinstance(members, (list, tuple)) else ())]
    arrays = any(isinstance(leaf, np.ndarray) for leaf in leaves)
    return ". NumPy arrays become tensors by torch.from_numpy(array)" if arrays else ""


def check_batch(batch: Any, device: torch.device) -> None:
    """Raise ``BatchError`` for a batch without data, or on another device than ``device``."""
    tensors = named_tensors(batch)
    if not tensors:
        raise BatchError(
            f"the batch ({type(batch).__name__}) holds no tensors: give a tensor, or a tuple, list, dict or "
            f"dataclass of tensors{_numpy_hint(batch)}"
        )
    for path, tensor in tensors.items():
        where = f"batch[{path!r}]" if path else "the batch"
        if tensor.numel() == 0:
            raise BatchError(
                f"{where} is empty (shape {tuple(tensor.shape)}): give a batch with samples"
            )
        if tensor.device.type != device.type and tensor.dim() > 0:
            raise BatchError(
                f"{where} is on {tensor.device}, but the model is on {device}: "
                f"move it there with .to({str(device)!r})"
            )


def batch_shapes(batch: Any) -> Shapes:
    """The dtype and shape of every tensor of ``batch`` by its path.

    >>> batch_shapes({"x": torch.zeros(4, 8), "y": torch.zeros(4, dtype=torch.int64)})
    {'x': ('float32', (4, 8)), 'y': ('int64', (4,))}
    """
    return {
        path: (str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for path, t in named_tensors(batch).items()
    }


def is_within(found: Shapes, most: Shapes) -> bool:
    """Whether the same tensors are there and no dimension of any is longer than in ``most``."""
    if found.keys() != most.keys():
        return False
    for path, (dtype, shape) in found.items():
        most_dtype, most_shape = most[path]
        if dtype != most_dtype or len(shape) != len(most_shape):
            return False
        if any(a > b for a, b in zip(shape, most_shape, strict=True)):
            return False
    return True


def shapes_from_json(data: Mapping[str, Any]) -> Shapes:
    """Shapes read back from JSON, where tuples are lists; raises ValueError or TypeError for anything else."""
    return {path: (str(dtype), tuple(map(int, shape))) for path, (dtype, shape) in data.items()}


def format_shapes(shapes: Shapes) -> str:
    """``shapes`` for a reader: ``x [4, 8], y [4]``."""
    return ", ".join(f"{path} {list(shape)}".strip() for path, (_, shape) in shapes.items())
