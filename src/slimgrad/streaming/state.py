"""The state of an optimizer in a store: which of its tensors are there, and how they come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from slimgrad.errors import StorageError
from slimgrad.storage import Slot, Store, dense_view, flat_like
from slimgrad.streaming.slices import Cut


@dataclass(frozen=True)
class Place:
    """Where one state tensor of a parameter is in the store, and what it looks like in memory."""

    slot: Slot
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]


class StoredState:
    """The state tensors that left ``optimizer.state`` for ``store``, by parameter and key.

    What has one element (step counts) and what is no tensor stays in ``optimizer.state``.
    """

    def __init__(self, optimizer: Optimizer, store: Store) -> None:
        self._optimizer = optimizer
        self._store = store
        self._places: dict[Tensor, dict[str, Place]] = {}
        self._keys: dict[Tensor, list[str]] = {}  # all keys, in the optimizer's own order

    def places(self, parameter: Tensor) -> dict[str, Place]:
        """Where the parameter's state tensors are, by key."""
        return self._places.get(parameter, {})

    def small(self, parameter: Tensor) -> dict[str, Any]:
        """What stayed in memory of the parameter's state."""
        return self._optimizer.state.get(parameter, {})

    def place_for(self, parameter: Tensor, key: str, dtype: torch.dtype) -> Place:
        """The place of a state tensor of the parameter's shape, made when it is new.

        Raises ``StorageError`` if the optimizer changed its dtype, which slices cannot follow.
        """
        places = self._places.setdefault(parameter, {})
        if key in places and places[key].dtype != dtype:
            raise StorageError(
                f"the optimizer's state {key!r} changed from {places[key].dtype} to {dtype} within a step, and "
                "cannot be updated in slices: leave the optimizer's state in memory"
            )
        if key not in places:
            slot = self._store.allocate(parameter.numel() * dtype.itemsize)
            places[key] = Place(slot, dtype, parameter.shape, parameter.stride())
        return places[key]

    def keep(self, parameter: Tensor, keys: list[str], small: dict[str, Any]) -> None:
        """After an update: ``keys`` are all keys of the state now, ``small`` those with a value in memory."""
        places = self.places(parameter)
        for key in [key for key in places if key in small or key not in keys]:
            self._store.free(places.pop(key).slot)
        if keys:
            self._keys[parameter] = keys
            self._optimizer.state[parameter] = small

    def take_in(self, parameter: Tensor, *, of_its_shape: bool) -> None:
        """Move the parameter's state tensors to the store: all, or those of its own shape only."""
        state = self.small(parameter)
        if not state:
            return
        keys = list(state)
        self._keys[parameter] = list(dict.fromkeys([*self._keys.get(parameter, []), *keys]))
        for key in keys:
            value = state[key]
            if not _can_move(value, parameter) or (of_its_shape and value.shape != parameter.shape):
                continue
            # what was loaded has strides of its own, and fused kernels take elements in the order of memory
            follows = value.shape == parameter.shape and dense_view(parameter) is not None
            stride = tuple((parameter if follows else value).stride())
            flat = flat_like(value, parameter) if follows else dense_view(value)
            if flat is None:
                flat = value.detach().contiguous()
                stride = tuple(flat.stride())
            slot = self._slot_for(parameter, key, value)
            self._store.write(slot, flat)  # the tensor is let go of only when it is written
            places = self._places.setdefault(parameter, {})
            places[key] = Place(slot, value.dtype, value.shape, stride)
            del state[key], value, flat
        for key in [key for key in self.places(parameter) if key in state]:
            self._store.free(self._places[parameter].pop(key).slot)

    def _slot_for(self, parameter: Tensor, key: str, value: Tensor) -> Slot:
        num_bytes = value.numel() * value.element_size()
        old = self._places.get(parameter, {}).pop(key, None)
        if old is not None and old.slot.num_bytes == num_bytes:
            return old.slot
        if old is not None:
            self._store.free(old.slot)
        return self._store.allocate(num_bytes)

    def full(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's whole state, its stored tensors read into new ones; empty if it has none."""
        places, small = self.places(parameter), self.small(parameter)
        state: dict[str, Any] = {}
        for key in dict.fromkeys([*self._keys.get(parameter, []), *small]):
            if key in places:
                state[key] = self.read(parameter, key)
            elif key in small:
                state[key] = small[key]
        return state

    def read(self, parameter: Tensor, key: str) -> Tensor:
        """One stored tensor, read into a new one of the shape and strides it had."""
        place = self._places[parameter][key]
        tensor = torch.empty_strided(
            place.shape, place.stride, dtype=place.dtype, device=self._store.device
        )
        flat = dense_view(tensor)
        assert flat is not None  # only dense strides are stored
        self._store.read(place.slot, flat)
        return tensor

    def slices(self, parameter: Tensor, cuts: list[Cut]) -> Iterator[tuple[str, int, Tensor]]:
        """The stored tensors of the parameter's shape, slice by slice: ``(key, start, values)``.

        ``values`` is flat, in the order of the parameter's memory, and is written over by the next slice.
        """
        length = max(end - start for start, end in cuts)
        for key, place in self.places(parameter).items():
            buffer = torch.empty(length, dtype=place.dtype, device=self._store.device)
            for start, end in cuts:
                values = buffer[: end - start]
                self._store.read(place.slot, values, start * place.dtype.itemsize)
                yield key, start, values

    def bring_back(self) -> None:
        """Read everything back into ``optimizer.state`` and give the places back."""
        for parameter in list(self._places):
            self._optimizer.state[parameter] = self.full(parameter)
            self.drop(parameter)

    def drop(self, parameter: Tensor) -> None:
        """Forget what is stored of the parameter's state."""
        for place in self._places.pop(parameter, {}).values():
            self._store.free(place.slot)
        self._keys.pop(parameter, None)

    def parameters(self) -> list[Tensor]:
        """The parameters with a state tensor in the store."""
        return [parameter for parameter, places in self._places.items() if places]


def _can_move(value: Any, parameter: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.numel() > 1
        and value.layout == torch.strided
        and value.device == parameter.device
    )
