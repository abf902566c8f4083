"""Schedules of nested recomputation over a chain of stages: what is held while backward is at a stage, and the best.

A schedule cuts stages ``[start, stop)``, whose input is in memory, in one of two ways:

- *keep*: run ``start`` and hold what its backward needs; then the same for ``[start + 1, stop)``;
- *split* after ``k`` stages: run them, holding nothing but what crosses into ``start + k``; do all of
  ``[start + k, stop)``, backward included; then do ``[start, start + k)``, again from its input.

It is written down as one number for each cut, in this order: 0 for keep, k for split, the right part before the left.
Missing numbers are 0, so that an empty schedule holds everything: one forward pass more and no other.

Backward asks from the last stage to the first. What is held when it asks for a stage depends on that stage alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_LEVELS = 512  # steps in which memory is counted, up to _MOST of what holding everything takes
_MOST = 0.7
_MOST_PARTS = 24
_SHARES = (0.5, 0.3, 0.2, 0.12, 0.07)


@dataclass(frozen=True)
class Holding:
    """The stages of which everything is held that backward will ask for, and those of which what enters them is."""

    stages: frozenset[int]
    borders: frozenset[int] = frozenset()

    def crosses(self, stage: int, last_stage: int) -> bool:
        """Whether what is made in ``stage`` and read up to ``last_stage`` enters one of the borders."""
        return stage < last_stage and any(stage < b <= last_stage for b in self.borders)


def holdings(schedule: Sequence[int], num_stages: int) -> list[Holding]:
    """What is held when backward is at each stage."""
    everything = Holding(frozenset(range(num_stages)))
    found = [everything] * num_stages
    if any(schedule):
        _walk(iter(schedule), 0, num_stages, Holding(frozenset()), found)
    return found


def _walk(
    codes: Iterator[int], start: int, stop: int, holding: Holding, found: list[Holding]
) -> None:
    while start < stop:
        code = next(codes, 0)
        if code:
            inner = Holding(holding.stages, holding.borders | {start})
            middle = start + code
            right = Holding(inner.stages, inner.borders | {middle})
            _walk(codes, middle, stop, right, found)
            holding, stop = inner, middle
        else:
            holding = Holding(holding.stages | {start}, holding.borders)
            found[start] = holding
            start += 1


@dataclass(frozen=True)
class Chain:
    """Stages to be run again: seconds of each, bytes that its backward needs, and bytes that enter it."""

    seconds: tuple[float, ...]
    saved_bytes: tuple[int, ...]
    border_bytes: tuple[int, ...]

    def stretch(self, start: int, stop: int) -> Chain:
        """Some of the stages."""
        part = slice(start, stop)
        return Chain(self.seconds[part], self.saved_bytes[part], self.border_bytes[part])


@functools.lru_cache(maxsize=256)
def best_schedules(chain: Chain) -> tuple[tuple[int, ...], ...]:
    """The fastest schedules for a falling number of bytes, the one that holds everything first.

    None takes longer than one more forward pass and another for each halving of the chain: O(log n) memory needs no more.

    By dynamic programming over the stages, with memory in 512 steps: the optimal persistent schedules of Beaumont et
    al., Optimal Checkpointing for Heterogeneous Chains (arXiv 1911.13214), theorem 1.
    """
    total, num = sum(chain.saved_bytes), len(chain.seconds)
    if num < 3 or not total:
        return ((),)
    table, most_seconds = _table(chain), sum(chain.seconds) * (1 + math.log2(num))
    lowest = table.lowest(most_seconds)
    if lowest is None:
        return ((),)
    levels = [round(share / _MOST * _LEVELS) for share in _SHARES]
    found: list[tuple[int, ...]] = [()]
    for level in [*(level for level in levels if level > lowest), lowest]:
        schedule = table.schedule(level)
        if schedule not in found:
            found.append(schedule)
    return tuple(found)


class _Table:
    """Least seconds of every stretch of parts within each number of levels of memory.

    A long chain is cut into parts of several stages; a part that is done alone has a table of its own.
    """

    def __init__(self, chain: Chain, level_bytes: float) -> None:
        size = -(-len(chain.seconds) // _MOST_PARTS)
        stretches = [chain.stretch(i, i + size) for i in range(0, len(chain.seconds), size)]
        self.chain, self.level_bytes, self.num = chain, level_bytes, len(stretches)
        self.sizes = [len(part.seconds) for part in stretches]
        self.seconds = [sum(part.seconds) for part in stretches]
        self.saved = [math.ceil(sum(part.saved_bytes) / level_bytes) for part in stretches]
        self.border = [math.ceil(part.border_bytes[0] / level_bytes) for part in stretches]
        self.inner = [_table(part) if len(part.seconds) > 1 else None for part in stretches]
        self.cost = np.full((self.num + 1, self.num + 1, _LEVELS + self.num + 1), np.inf)
        self.cut = np.zeros(self.cost.shape, dtype=np.int32)
        for start in range(self.num + 1):
            self.cost[start, start] = 0.0
        for length in range(1, self.num + 1):
            for start in range(self.num - length + 1):
                self._solve(start, start + length)

    def _solve(self, start: int, stop: int) -> None:
        inner = self.inner[start]
        if stop == start + 1 and inner is not None:
            levels = [self._level_inside(inner, m) for m in range(self.cost.shape[2])]
            self.cost[start, stop] = inner.cost[0, inner.num, levels]
            self.cost[start, stop, self.saved[start] :] = self.seconds[start]
            return
        best = self.seconds[start] + _within(self.cost[start + 1, stop], self.saved[start])
        cut = np.zeros(len(best), dtype=np.int32)
        forward_s = 0.0
        for middle in range(start + 1, stop):
            forward_s += self.seconds[middle - 1]
            right = _within(self.cost[middle, stop], self.border[middle])
            split = forward_s + right + self.cost[start, middle]
            better = split < best
            best = np.where(better, split, best)
            cut[better] = middle - start
        self.cost[start, stop], self.cut[start, stop] = best, cut

    def _level_inside(self, inner: _Table, level: int) -> int:
        return min(int(level * self.level_bytes / inner.level_bytes), inner.cost.shape[2] - 1)

    def lowest(self, most_seconds: float) -> int | None:
        """The fewest levels with which the whole chain can be run in that time; None if no number is enough."""
        enough = np.flatnonzero(self.cost[0, self.num] <= most_seconds)
        return int(enough[0]) if enough.size else None

    def schedule(self, level: int) -> tuple[int, ...]:
        """The fastest within ``level`` levels, zeros at its end left out."""
        codes = list(self._codes(0, self.num, level))
        while codes and codes[-1] == 0:
            codes.pop()
        return tuple(codes)

    def _codes(self, start: int, stop: int, level: int) -> Iterator[int]:
        while start < stop:
            inner = self.inner[start]
            if stop == start + 1 and inner is not None and level < self.saved[start]:
                yield from inner._codes(0, inner.num, self._level_inside(inner, level))
                return
            code = int(self.cut[start, stop, level])
            if code:
                yield sum(self.sizes[start : start + code])
                yield from self._codes(start + code, stop, level - self.border[start + code])
                stop = start + code
            else:
                yield from [0] * self.sizes[start]
                level -= self.saved[start]
                start += 1


@functools.lru_cache(maxsize=16)  # a table takes megabytes
def _table(chain: Chain) -> _Table:
    return _Table(chain, _MOST * max(sum(chain.saved_bytes), 1) / _LEVELS)


def _within(cost: np.ndarray, levels: int) -> np.ndarray:
    """``cost`` with ``levels`` of the memory taken."""
    if levels == 0:
        return cost
    taken = min(levels, len(cost))
    return np.concatenate((np.full(taken, np.inf), cost[: len(cost) - taken]))
