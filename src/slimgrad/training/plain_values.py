"""Python values as plain JSON and back, with nothing pickled: what optimizers, schedulers and generators keep.

JSON has no tuples, no dictionaries with other keys than text, and no arrays of bytes; these become tagged objects.
Floats survive bit for bit (Python writes the shortest text that reads back the same).
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from slimgrad.errors import CheckpointError, UnsupportedError

Json: TypeAlias = "bool | int | float | str | list[Any] | dict[str, Any] | None"
MAX_TENSOR_BYTES: Final = 64 * 2**10
_TAG: Final = "$"


def encode(value: Any, place: str = "value") -> Json:
    """``value`` as JSON. Raises ``UnsupportedError``, naming ``place``, for what has no plain form.

    >>> decode(encode((1, {2: 0.5})))
    (1, {2: 0.5})
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TAG: "tuple", "items": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, place)
    if isinstance(value, Tensor):
        return _encode_tensor(value, place)
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value, place)
    raise UnsupportedError(
        f"{place} is a {type(value).__name__}, which has no plain form: a checkpoint pickles nothing. "
        "It stores numbers, text, lists, tuples, dictionaries and tensors"
    )


def _encode_mapping(value: Mapping[Any, Any], place: str) -> Json:
    kind = "counter" if isinstance(value, collections.Counter) else "dict"
    if kind == "dict" and all(isinstance(key, str) for key in value) and _TAG not in value:
        return {key: encode(item, f"{place}.{key}") for key, item in value.items()}
    items = [[encode(key, place), encode(item, f"{place}[{key!r}]")] for key, item in value.items()]
    return {_TAG: kind, "items": items}


def _encode_tensor(value: Tensor, place: str) -> Json:
    if value.numel() * value.element_size() > MAX_TENSOR_BYTES:
        raise UnsupportedError(
            f"{place} is a tensor of shape {tuple(value.shape)}, too large for the JSON part of a checkpoint "
            f"(at most {MAX_TENSOR_BYTES:,} bytes): keep it as an entry of the optimizer's state"
        )
    flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    dtype = str(value.dtype).removeprefix("torch.")
    return {
        _TAG: "tensor",
        "dtype": dtype,
        "shape": list(value.shape),
        "hex": flat.numpy().tobytes().hex(),
    }


def _encode_array(value: np.ndarray[Any, Any] | np.generic, place: str) -> Json:
    if value.dtype.hasobject or value.nbytes > MAX_TENSOR_BYTES:
        raise UnsupportedError(
            f"{place} is an array of {value.dtype} with {value.nbytes:,} bytes: a checkpoint's JSON holds "
            f"numbers only, at most {MAX_TENSOR_BYTES:,} bytes of them"
        )
    return {
        _TAG: "array",
        "dtype": value.dtype.str,
        "shape": list(value.shape),
        "scalar": isinstance(value, np.generic),
        "hex": value.tobytes().hex(),
    }


def decode(value: Any) -> Any:
    """The value that ``encode`` was given. Raises ``CheckpointError`` for an unknown tag."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: decode(item) for key, item in value.items()}
    kind = value[_TAG]
    if kind == "tuple":
        return tuple(decode(item) for item in value["items"])
    if kind in ("dict", "counter"):
        pairs = {decode(key): decode(item) for key, item in value["items"]}
        return collections.Counter(pairs) if kind == "counter" else pairs
    data = bytearray.fromhex(value.get("hex", ""))
    if kind == "tensor":
        flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return flat.view(getattr(torch, value["dtype"])).reshape(value["shape"])
    if kind == "array":
        array = np.frombuffer(data, dtype=np.dtype(value["dtype"])).reshape(value["shape"]).copy()
        return array[()] if value["scalar"] else array
    raise CheckpointError(f"unknown kind of value {kind!r}: the checkpoint is of a newer format")
