"""What an operation tape moves out of memory, or keeps as a code: written in forward, read in backward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from slimgrad.code import Code, PlacedCode
from slimgrad.methods.activations.coded import Coded
from slimgrad.methods.activations.values import Value
from slimgrad.storage import Store
from slimgrad.storage.stored import Stored, is_whole, whole_storage


class Moving:
    """The values of one tape that leave memory where autograd saves them, by the numbers of their storages.

    Those in ``numbers`` are moved to ``store``; those that ``codes`` names are kept as their codes.
    """

    def __init__(
        self, numbers: frozenset[int], store: Store | None, codes: Mapping[int, PlacedCode]
    ) -> None:
        self._numbers = numbers
        self._store = store
        self._codes = codes
        self._waiting: list[tuple[Value, Code | None, Tensor]] = []  # for the next operation
        self._saved: list[weakref.ref[Value]] = []  # in the order in which they were saved last

    def add(self, number: int | None, origin: int, value: Value, tensor: Tensor) -> None:
        """Autograd saves ``value``, which ``tensor`` shows, on the storage ``number``, made by ``origin``."""
        placed = self._codes.get(number) if number is not None else None
        if value.is_kept or (placed is None and number not in self._numbers):
            return
        if placed is not None and not placed.is_for(origin):  # the block runs in another mode
            value.keep(tensor)
            return
        code = placed.code if placed is not None else None
        if value.num_handles == 1 and value.stored is None:
            if not is_whole(tensor):
                value.keep(tensor)
                return
            self._waiting.append((value, code, tensor))
        self._saved.append(weakref.ref(value))

    def start_writes(self) -> None:
        """Write what was saved since the last operation; its storage is let go when it is written."""
        if self._waiting:
            with torch.no_grad():
                while self._waiting:
                    self._write(*self._waiting.pop(0))

    def _write(self, value: Value, code: Code | None, tensor: Tensor) -> None:
        whole = None if value.is_kept else whole_storage(tensor)
        if whole is None:
            return
        if code is not None:
            value.stored = Coded(code, tensor, whole)
        elif self._store is not None:
            value.stored = Stored(self._store, whole)

    def end(self) -> None:
        """Forward is over. On the CPU nothing is left to be written, so that the bytes are gone from here on."""
        self.start_writes()
        if self._store is not None and self._store.device.type == "cpu":
            for reference in self._saved:
                if (value := reference()) is not None and value.stored is not None:
                    value.stored.settle()

    def stop(self) -> None:
        """Forward has failed: nothing more is written."""
        self._waiting.clear()

    def read_ahead(self, value: Value) -> None:
        """Backward asks for ``value``: read it where it was moved, and what it will ask for next of those moved."""
        value.read_ahead()
        for reference in reversed(self._saved):
            after = reference()
            if after is not None and after is not value and after.is_away:
                after.read_ahead()
                return
