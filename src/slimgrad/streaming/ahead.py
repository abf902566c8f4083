"""Reading the state of the next slices while one is computed, into buffers allocated once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgrad.storage import Store, Transfer
from slimgrad.streaming.slices import Cut
from slimgrad.streaming.state import StoredState

_ALIGNMENT = 64  # bytes


@dataclass
class Ready:
    """A slice of a parameter and its state, in buffer ``buffer``, when ``transfers`` are done."""

    parameter: Tensor
    cut: Cut
    buffer: int
    parts: dict[str, Tensor]
    transfers: list[Transfer]


class ReadAhead:
    """``num_buffers`` buffers, each for one slice of every state tensor of a parameter.

    ``cuts(parameter)`` are the slices of a parameter, ``after(parameter)`` the one expected next and
    ``num_elements(itemsize)`` the longest slice of any. Transfers of a store are done in order, so a buffer is
    read into as soon as its write was started.
    """

    def __init__(
        self,
        state: StoredState,
        store: Store,
        num_buffers: int,
        *,
        cuts: Callable[[Tensor], list[Cut] | None],
        after: Callable[[Tensor], Tensor | None],
        num_elements: Callable[[int], int],
    ) -> None:
        self._state, self._store, self._num_buffers = state, store, num_buffers
        self._cuts, self._after, self._num_elements = cuts, after, num_elements
        self._buffers: list[Tensor] = []
        self._queue: deque[Ready] = deque()
        self._writes: list[list[Transfer]] = [[] for _ in range(num_buffers)]
        self._turn = 0

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the buffers as allocated."""
        return sum(buffer.numel() for buffer in self._buffers)

    def take(self, parameter: Tensor, cut: Cut) -> Ready:
        """The state of a slice, in a buffer; what was read ahead for another slice is dropped."""
        ready = None
        while self._queue and ready is None:
            first = self._queue.popleft()
            if first.parameter is parameter and first.cut == cut:
                ready = first
            else:
                self._writes[first.buffer].extend(first.transfers)
        if ready is None:
            self._request(parameter, cut)
            ready = self._queue.popleft()
        self._fill(ready, is_written=False)
        for transfer in ready.transfers:
            transfer.wait()
        return ready

    def give_back(self, ready: Ready, writes: list[Transfer]) -> None:
        """The slice is computed and ``writes`` of its buffer were started: the buffer is used again."""
        self._writes[ready.buffer].extend(writes)
        self._fill(ready, is_written=True)

    def forget(self) -> None:
        """Drop what was read ahead: the state in the store has changed."""
        while self._queue:
            first = self._queue.popleft()
            self._writes[first.buffer].extend(first.transfers)

    def drain(self) -> None:
        """Wait for all that was started; raises ``StorageError`` for what went wrong."""
        for ready in self._queue:
            for transfer in ready.transfers:
                transfer.wait()
        for index, transfers in enumerate(self._writes):
            self._writes[index] = []
            for transfer in transfers:
                transfer.wait()

    def release(self) -> None:
        """Free the buffers until the next slice is asked for: between updates they would be live for nothing."""
        self.forget()
        self.drain()
        self._buffers.clear()

    def _fill(self, now: Ready, *, is_written: bool) -> None:
        """Have slices on their way into all buffers but that of ``now``, once written into that one too."""
        is_over = is_written and now.cut == (self._cuts(now.parameter) or [now.cut])[-1]
        while len(self._queue) < self._num_buffers - (not is_written):
            last = self._queue[-1] if self._queue else now
            following = self._following(last.parameter, last.cut)
            if following is None:
                return
            parameter, cut = following
            starts_anew = cut[0] == 0
            # a parameter's state must not be read while it is still being updated, nor twice ahead
            if starts_anew and parameter is now.parameter and not is_over:
                return
            if starts_anew and any(ready.parameter is parameter for ready in self._queue):
                return
            self._request(parameter, cut)

    def _following(self, parameter: Tensor, cut: Cut) -> tuple[Tensor, Cut] | None:
        cuts = self._cuts(parameter)
        if cuts and cut in cuts[:-1]:
            return parameter, cuts[cuts.index(cut) + 1]
        following = self._after(parameter)
        if following is None or not self._state.places(following):
            return None
        first = self._cuts(following)
        return (following, first[0]) if first else None

    def _request(self, parameter: Tensor, cut: Cut) -> None:
        places = self._state.places(parameter)
        self._grow([place.dtype.itemsize for place in places.values()], cut[1] - cut[0])
        index, self._turn = self._turn, (self._turn + 1) % self._num_buffers
        transfers, self._writes[index] = self._writes[index], []
        parts: dict[str, Tensor] = {}
        end = 0
        for key, place in places.items():
            itemsize = place.dtype.itemsize
            start = _aligned(end)
            end = start + (cut[1] - cut[0]) * itemsize
            parts[key] = self._buffers[index][start:end].view(place.dtype)
            transfers.append(self._store.start_read(place.slot, parts[key], cut[0] * itemsize))
        self._queue.append(Ready(parameter, cut, index, parts, transfers))

    def _grow(self, itemsizes: list[int], length: int) -> None:
        if self._buffers and self._buffers[0].numel() >= _packed(itemsizes, length):
            return
        longest = max(length, self._num_elements(max(itemsizes)))
        self._buffers.clear()
        self._buffers = [
            torch.empty(_packed(itemsizes, longest), dtype=torch.uint8, device=self._store.device)
            for _ in range(self._num_buffers)
        ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _packed(itemsizes: list[int], length: int) -> int:
    end = 0
    for itemsize in itemsizes:
        end = _aligned(end) + length * itemsize
    return end
