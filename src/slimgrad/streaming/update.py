"""The update of one parameter after another, each in slices."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from slimgrad.optimizers import group_of, is_sliceable, step_parameter, step_part
from slimgrad.storage import Store, Transfer, dense_view, flat_like, same_order
from slimgrad.streaming.ahead import ReadAhead, Ready
from slimgrad.streaming.slices import Cut, cuts_of
from slimgrad.streaming.state import StoredState

if TYPE_CHECKING:
    from slimgrad.host import Host

GradientSlice: TypeAlias = Callable[[int, int], Tensor]
"""``gradient(start, end)``: those elements of a parameter's gradient, flat, in the order of the parameter's memory."""

_SMALLEST = 4  # elements of a slice

_attached: weakref.WeakKeyDictionary[Host, weakref.ref[StreamedUpdate]] = (
    weakref.WeakKeyDictionary()
)


class StreamedUpdate:
    """The updates of a host's parameters, their optimizer state living in ``store``.

    ``slice_bytes`` bounds a slice of any one tensor; ``num_buffers`` slices of the state are in memory.
    """

    def __init__(self, host: Host, store: Store, slice_bytes: int, num_buffers: int) -> None:
        if host.optimizer is None:
            raise TypeError("this host has no optimizer")
        self._host = weakref.ref(host)
        self._optimizer = host.optimizer
        self._store = store
        self._slice_bytes = slice_bytes
        self._sliceable: dict[tuple[int, torch.dtype], bool] = {}
        self._groups: tuple[list[int], dict[int, int]] = [], {}
        self._order: Sequence[Tensor] | None = None
        self._following: tuple[tuple[int, int], dict[int, Tensor]] | None = None
        self.state = StoredState(host.optimizer, store)
        self.ahead = ReadAhead(
            self.state,
            store,
            num_buffers,
            cuts=self.cuts,
            after=self._after,
            num_elements=self._longest_slice,
        )
        _attached[host] = weakref.ref(self)

    @staticmethod
    def of(host: Host) -> StreamedUpdate | None:
        """The streamed update behind ``host.update``, or None."""
        reference = _attached.get(host)
        streamed = reference() if reference is not None else None
        return streamed if streamed is not None and host.update == streamed.update else None

    def cuts(self, parameter: Tensor) -> list[Cut] | None:
        """The slices in which ``parameter`` is updated, or None if it is updated whole."""
        if parameter.numel() < 2 or not self._has_order(parameter):
            return None
        kind = (self._group_index(parameter), parameter.dtype)
        if kind not in self._sliceable:
            self._sliceable[kind] = is_sliceable(self._optimizer, *kind)
        return self._cut(parameter) if self._sliceable[kind] else None

    def _has_order(self, parameter: Tensor) -> bool:
        """Whether the parameter has no holes in memory, and its stored state is in the order in which it lies there."""
        if dense_view(parameter) is None:
            return False
        shape, stride = parameter.shape, parameter.stride()
        places = self.state.places(parameter).values()
        return all(p.shape != shape or same_order(shape, p.stride, stride) for p in places)

    def _group_index(self, parameter: Tensor) -> int:
        groups = self._optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if self._groups[0] != sizes:
            found = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            self._groups = sizes, found
        return self._groups[1][id(parameter)]

    def _cut(self, parameter: Tensor) -> list[Cut]:
        places = self.state.places(parameter).values()
        widest = max([parameter.element_size(), *(place.dtype.itemsize for place in places)])
        return cuts_of(parameter.numel(), max(_SMALLEST, self._slice_bytes // widest))

    def _longest_slice(self, itemsize: int) -> int:
        host = self._host()
        largest = max(p.numel() for p in host.parameters()) if host is not None else 0
        return min(largest, max(_SMALLEST, self._slice_bytes // itemsize))

    def expect(self, order: Sequence[Tensor] | None) -> None:
        """Say in which order parameters will be updated; None: as gradients completed in the last step."""
        self._order = order
        self._following = None

    def _after(self, parameter: Tensor) -> Tensor | None:
        host = self._host()
        order = self._order if self._order is not None else host.gradient_order if host else []
        stamp = (id(order), len(order))
        if self._following is None or self._following[0] != stamp:
            following = [*order[1:], *order[:1]]
            self._following = stamp, {id(p): q for p, q in zip(order, following, strict=True)}
        return self._following[1].get(id(parameter))

    def update(self, parameter: Tensor) -> None:
        """Update ``parameter`` from its ``.grad``; without one nothing is done, as in the optimizer itself."""
        gradient = parameter.grad
        if gradient is None:
            return
        if gradient.layout != torch.strided or self.cuts(parameter) is None:
            self._update_whole(parameter)
            return
        flat = flat_like(gradient.detach(), parameter)
        self.update_slices(parameter, lambda start, end: flat[start:end])

    def _update_whole(self, parameter: Tensor) -> None:
        if self.cuts(parameter) is not None:  # a sparse gradient: slices of it may be on their way
            self.ahead.forget()
        state = self.state.full(parameter)
        if state:
            self._optimizer.state[parameter] = state
        self.state.drop(parameter)
        del state
        try:
            step_parameter(self._optimizer, parameter)
        finally:
            self.take_in(parameter)

    def take_in(self, parameter: Tensor) -> None:
        """Move what ``optimizer.state`` holds of the parameter to the store."""
        self.state.take_in(parameter, of_its_shape=self.cuts(parameter) is not None)

    def update_slices(self, parameter: Tensor, gradient: GradientSlice) -> None:
        """Update a parameter that has ``cuts``, taking its gradient slice by slice."""
        group = group_of(self._optimizer, parameter)
        if any(
            isinstance(v, Tensor) and v.numel() > 1 for v in self.state.small(parameter).values()
        ):
            self.ahead.forget()
            self.take_in(parameter)  # state that came into memory by another way than an update
        is_stored = bool(self.state.places(parameter))
        small = self.state.small(parameter)
        flat = flat_like(parameter, parameter)
        keys, left = list(small), small
        for cut in self.cuts(parameter) or []:
            ready = self.ahead.take(parameter, cut) if is_stored else None
            # every slice starts from the same step count
            state = {key: _own(value) for key, value in small.items()}
            state.update(ready.parts if ready is not None else {})
            part = flat[cut[0] : cut[1]]
            state = step_part(self._optimizer, group, part, gradient(*cut), state)
            keys, left = list(state), self._write(parameter, cut, state, ready)
            state.clear()
        places = len(self.state.places(parameter))
        self.state.keep(parameter, keys, left)
        if len(self.state.places(parameter)) != places:
            self.ahead.forget()

    def _write(
        self, parameter: Tensor, cut: Cut, state: dict[str, Any], ready: Ready | None
    ) -> dict[str, Any]:
        """Write a slice's new state; what is returned stays in memory."""
        writes: list[Transfer] = []
        left: dict[str, Any] = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != (cut[1] - cut[0],):
                left[key] = value
                continue
            place = self.state.place_for(parameter, key, value.dtype)
            offset = cut[0] * value.element_size()
            transfer = self._store.start_write(place.slot, value.detach().contiguous(), offset)
            if ready is not None and ready.parts.get(key) is value:
                writes.append(transfer)
            else:  # a tensor of the optimizer's own, as in the first step: one slice of them at a time
                transfer.wait()
        if ready is not None:
            self.ahead.give_back(ready, writes)
        return left

    def state_slices(self, parameter: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """The parameter's stored state, ``(key, first element, flat values)`` slice by slice.

        ``values`` is written over by the next slice. Step counts and the like are in ``optimizer.state``. Of a
        parameter that is updated whole, or is not contiguous, each tensor comes as one slice.
        """
        self.ahead.drain()
        cuts = self.cuts(parameter)
        if cuts is not None and parameter.is_contiguous():
            yield from self.state.slices(parameter, cuts)
            return
        for key in self.state.places(parameter):
            yield key, 0, self.state.read(parameter, key).reshape(-1)

    def bring_back(self) -> None:
        """Move all state back to ``optimizer.state``; raises ``StorageError`` if it cannot be read."""
        self.ahead.forget()
        self.ahead.drain()
        self.state.bring_back()

    def reload(self) -> None:
        """Move the state that ``optimizer.state`` holds now to the store, in place of what is there."""
        self.ahead.forget()
        for parameter in self.state.parameters():
            self.state.drop(parameter)
        self.take_in_all()

    def take_in_all(self) -> None:
        """Move the state of all parameters to the store."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self.take_in(parameter)

    def full_state(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's whole state, its stored tensors read into new ones."""
        self.ahead.drain()
        return self.state.full(parameter)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
