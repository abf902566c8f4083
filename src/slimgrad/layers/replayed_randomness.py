"""Random states noted on a first run and set for a second one, kept as bytes: no tensors that a ledger would count."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes

RandomStates: TypeAlias = tuple[bytes, ...]


class Draws:
    """The generators that operations on ``device`` draw from, and the states that were noted of them."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.empty(0, device=device).device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._noted: RandomStates = ()

    def note(self) -> RandomStates:
        """The states now; the same object as last time where nothing was drawn since."""
        with _disable_current_modes():
            states = [generator.get_state() for generator in self._generators]
            now = tuple(ctypes.string_at(state.data_ptr(), state.nbytes) for state in states)
        if now != self._noted:
            self._noted = now
        return self._noted

    @contextmanager
    def replaying(self) -> Generator[None]:
        """Leave every generator as it was before the body."""
        before = self.note()
        try:
            yield
        finally:
            self.rewind(before)

    def rewind(self, states: RandomStates) -> None:
        """Set the generators to ``states``."""
        with _disable_current_modes():
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
