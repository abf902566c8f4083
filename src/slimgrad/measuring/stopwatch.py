"""Seconds of work on any device: until all of it is done, of runs in turns, on what is not in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")

_TURNS = 3  # at least, and up to so many times more of short runs


def wait_for(device: torch.device | str) -> None:
    """Return when all that was queued on the device is done."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device | str) -> float:
    """Seconds from now until what ``run`` starts on the device is done."""
    wait_for(device)
    begin = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - begin


def in_turns(runs: Sequence[Callable[[], _T]], *, limit_s: float = 4.0) -> list[list[_T]]:
    """What each run returns, turn after turn: three turns, and up to nine of them within ``limit_s`` seconds."""
    found: list[list[_T]] = [[] for _ in runs]
    begin = time.perf_counter()
    while len(found[0]) < _TURNS or (
        time.perf_counter() - begin < limit_s and len(found[0]) < _TURNS**2
    ):
        for run, results in zip(runs, found, strict=True):
            results.append(run())
    return found


class OtherData:
    """What fills the processor's cache on a device, so that a run finds there nothing of the run before.

    In a step weights and what was saved for backward were used long ago.
    """

    num_bytes = 32 << 20  # at least what the last level of a processor's cache holds

    def __init__(self, device: torch.device | str) -> None:
        self._data: Tensor = torch.zeros(self.num_bytes, dtype=torch.int8, device=device)

    def use(self) -> None:
        """Write it: it takes the cache."""
        self._data.add_(1)
