"""Random states noted on a first run and set for a second one, kept as bytes: no tensors that a ledger would count."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.measuring.randomness import generators_on, noted_state, rewind

RandomStates: TypeAlias = tuple[bytes, ...]


class Draws:
    """The generators that operations on ``device`` draw from, and the states that were noted of them."""

    def __init__(self, device: torch.device) -> None:
        self._generators = generators_on(device)
        self._noted: RandomStates = ()

    def note(self) -> RandomStates:
        """The states now; the same object as last time where nothing was drawn since."""
        with _disable_current_modes():
            now = tuple(map(noted_state, self._generators))
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
                rewind(generator, state)
