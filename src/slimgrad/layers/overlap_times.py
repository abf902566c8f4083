"""Whether a reversible chain's backward is faster with reconstruction on a second thread: timed here and now."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from slimgrad.errors import UnsupportedError
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.measuring.machine import cores
from slimgrad.measuring.randomness import kept_randomness
from slimgrad.measuring.stopwatch import seconds_of
from slimgrad.measuring.tracker import device_of

_NOISE: Final = 0.05  # a gain below this is not told from none


@dataclass(frozen=True)
class OverlapTimes:
    """Median seconds of forward and backward: overlapped, and in order by the threads inside operations.

    Overlapped passes use ``num_threads`` threads inside operations on each of two threads; so passes in order are timed
    with ``num_threads`` and, where there are as many cores, with twice as many, and the faster one counts.
    """

    overlapped_s: float
    sequential_s: Mapping[int, float]
    num_threads: int
    num_cores: int

    @property
    def ratio(self) -> float:
        """Overlapped seconds over those in order."""
        return self.overlapped_s / min(self.sequential_s.values())

    @property
    def is_faster(self) -> bool:
        """Whether there is a core for the second thread, and a gain of more than 5 % with it."""
        return self.num_cores > 1 and self.ratio < 1 - _NOISE

    def __str__(self) -> str:
        threads = ", ".join(f"{n}: {1e3 * s:.1f} ms" for n, s in self.sequential_s.items())
        return (
            f"overlapped / sequential {self.ratio:.2f} on {self.num_cores} cores: {1e3 * self.overlapped_s:.1f} ms "
            f"with 2 x {self.num_threads} threads; in order by threads {threads}; "
            f"{'overlapped' if self.is_faster else 'in order'} is chosen"
        )


def copied_blocks(blocks: Sequence[ReversibleBlock]) -> list[ReversibleBlock]:
    """Copies that call no hook of the user's. Raises UnsupportedError where a block cannot be copied."""
    try:
        copies = copy.deepcopy(list(blocks))
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"the blocks cannot be copied, so overlap cannot be timed on them ({error}); set overlap to True or False"
        ) from error
    for block in copies:
        for module in block.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return copies


def time_overlap(
    trial: nn.Module, streams: Sequence[Tensor], extras: tuple[Any, Any], num_runs: int
) -> OverlapTimes:
    """Time ``trial``, a chain of its own, with ``overlap`` and without, in turns. Random states are put back."""
    num_threads, num_cores = torch.get_num_threads(), cores()
    counts = [n for n in (num_threads, 2 * num_threads) if n == num_threads or n <= num_cores]
    args, kwargs = tree_map(_leaf, extras)
    leaves = [x.detach().requires_grad_() for x in streams]
    wanted = [*leaves, *(p for p in trial.parameters() if p.requires_grad)]

    def run() -> None:
        out = trial(leaves, *args, **kwargs)
        torch.autograd.grad(out, wanted, [torch.ones_like(x) for x in out], allow_unused=True)

    ways = [(False, n) for n in counts] + [(True, num_threads)]
    with kept_randomness(), torch.enable_grad():
        seconds = _in_turns(trial, run, ways, num_runs)
    *in_order, overlapped = seconds
    return OverlapTimes(
        overlapped, dict(zip(counts, in_order, strict=True)), num_threads, num_cores
    )


def _in_turns(
    trial: Any, run: Callable[[], None], ways: Sequence[tuple[bool, int]], num_runs: int
) -> list[float]:
    """Median seconds of each way, after one run that is not counted."""
    device = device_of(trial)
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(num_runs + 1):
        for (overlap, num_threads), seconds in zip(ways, taken, strict=True):
            trial.overlap = overlap
            with _threads(num_threads):
                took_s = seconds_of(run, device)
            if turn:
                seconds.append(took_s)
    return [statistics.median(seconds) for seconds in taken]


@contextmanager
def _threads(number: int) -> Generator[None]:
    before = torch.get_num_threads()
    if number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)
