"""Every random state that a step may draw from: torch on each device, Python's and NumPy's."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class OutsideTorch:
    """The states of Python's and NumPy's global generators."""

    python: Any
    numpy: Any

    @staticmethod
    def now() -> OutsideTorch:
        """Read both."""
        return OutsideTorch(random.getstate(), np.random.get_state())

    def restore(self) -> None:
        """Set both."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)

    def same_as(self, other: OutsideTorch) -> bool:
        """Whether two states would draw the same numbers."""
        return self.python == other.python and all(
            np.array_equal(a, b) for a, b in zip(self.numpy, other.numpy, strict=True)
        )


@dataclass
class RandomState:
    """The state of every global generator."""

    cpu: Tensor
    cuda: list[Tensor]
    outside: OutsideTorch

    @staticmethod
    def now() -> RandomState:
        """Read all of them."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        cuda = torch.cuda.get_rng_state_all() if on_gpu else []
        return RandomState(torch.get_rng_state(), cuda, OutsideTorch.now())

    def restore(self) -> None:
        """Set all of them."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        self.outside.restore()

    def same_as(self, other: RandomState) -> bool:
        """Whether two states would draw the same numbers."""
        return (
            torch.equal(self.cpu, other.cpu)
            and len(self.cuda) == len(other.cuda)
            and all(torch.equal(a, b) for a, b in zip(self.cuda, other.cuda, strict=True))
            and self.outside.same_as(other.outside)
        )


@contextmanager
def kept_randomness() -> Generator[None]:
    """Whatever the body draws, the random states afterwards are those from before."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


@dataclass(frozen=True)
class NotedRandomness:
    """The state of every global generator as plain bytes: no tensors that a ledger would count."""

    cpu: bytes
    cuda: tuple[bytes, ...]
    outside: OutsideTorch

    @staticmethod
    def now(before: NotedRandomness | None = None) -> NotedRandomness:
        """Read all of them; what is as it was ``before`` is shared with that."""
        state = RandomState.now()
        cuda = tuple(_bytes_of(one) for one in state.cuda)
        outside = state.outside
        if before is not None and before.outside.same_as(outside):
            outside = before.outside
        return NotedRandomness(_bytes_of(state.cpu), cuda, outside)

    def restore(self) -> None:
        """Set all of them."""
        cpu, *cuda = (_as_state(one) for one in (self.cpu, *self.cuda))
        RandomState(cpu, cuda, self.outside).restore()


def generators_on(device: torch.device) -> list[torch.Generator]:
    """The global generators that operations on ``device`` draw from: the CPU's, and its own."""
    found = [torch.default_generator]
    if device.type == "cuda" and torch.cuda.is_initialized():
        index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
        found.append(torch.cuda.default_generators[index])
    return found


def noted_state(generator: torch.Generator) -> bytes:
    """A generator's state, no tensor: a ledger counts what lives on the device."""
    return _bytes_of(generator.get_state())


def rewind(generator: torch.Generator, noted: bytes) -> None:
    """Set a generator to what ``noted_state`` gave."""
    generator.set_state(_as_state(noted))


def _bytes_of(state: Tensor) -> bytes:
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _as_state(noted: bytes) -> Tensor:
    return torch.frombuffer(bytearray(noted), dtype=torch.uint8)
