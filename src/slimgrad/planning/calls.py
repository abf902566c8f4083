"""The calls of a traced step's blocks: what they save, how long they take; and changes to a step's lifetimes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slimgrad.measuring.trace import Call, Trace


class Changes:
    """Lifetimes that start (+) or end (-) at slots, each with its column."""

    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    @property
    def rows(self) -> np.ndarray:
        """Rows of (slot, bytes, column)."""
        if len(self._parts) != 1:
            none = np.zeros((0, 3), dtype=np.int64)
            self._parts = [np.concatenate(self._parts) if self._parts else none]
        return self._parts[0]

    def span(self, start: int, stop: int, nbytes: float, column: int) -> None:
        """``nbytes`` live in slots ``start`` to ``stop`` (negative: no longer live there)."""
        if start < stop and nbytes:
            rows = ((start, int(nbytes), column), (stop, -int(nbytes), column))
            self._parts.append(np.array(rows, dtype=np.int64))

    def spans(
        self, start: np.ndarray, stop: np.ndarray, nbytes: np.ndarray, column: np.ndarray
    ) -> None:
        """Many of ``span``, an entry each."""
        real = (start < stop) & (nbytes != 0)
        nbytes, column = nbytes[real], column[real]
        self._parts.append(np.stack((start[real], nbytes, column), axis=1))
        self._parts.append(np.stack((stop[real], -nbytes, column), axis=1))

    def extend(self, other: Changes) -> None:
        """Add another set."""
        self._parts += other._parts


@dataclass(frozen=True)
class BlockLayout:
    """The calls of one block, or of blocks in a row, and what they save inside.

    ``groups`` are the calls that belong together: one each for a single block, else those of one pass over all of
    ``paths``. ``saved`` maps the first call of a group to the storages its backward needs, made inside.
    """

    paths: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    saved: Mapping[int, tuple[int, ...]]

    @property
    def path(self) -> str:
        """The path of the first block."""
        return self.paths[0]

    @property
    def where(self) -> str | tuple[str, ...]:
        """The path, or of blocks in a row the paths."""
        return self.path if len(self.paths) == 1 else self.paths

    @property
    def calls(self) -> tuple[int, ...]:
        """All calls."""
        return tuple(call for group in self.groups for call in group)


def ticks_by_call(trace: Trace, *, backward: bool) -> list[np.ndarray]:
    """The ticks of each call's operations, forward or backward."""
    ticks = np.flatnonzero(trace.op_backward == backward)
    ticks = ticks[np.argsort(trace.op_call[ticks], kind="stable")]
    ends = np.searchsorted(trace.op_call[ticks], np.arange(len(trace.calls) + 1))
    return [ticks[a:b] for a, b in itertools.pairwise(ends)]


def call_seconds(trace: Trace, calls: tuple[int, ...], *, backward: bool) -> float:
    """Seconds of the operations of these calls, forward or backward."""
    mine = np.isin(trace.op_call, calls) & (trace.op_backward == backward)
    return float(trace.op_seconds[mine].sum()) if trace.op_seconds.size else 0.0


def takers(calls: Sequence[Call]) -> dict[int, list[int]]:
    """The calls that each storage crosses into."""
    found: dict[int, list[int]] = {}
    for index, call in enumerate(calls):
        for storage in call.inputs:
            found.setdefault(storage, []).append(index)
    return found


def call_bytes(trace: Trace, storages: tuple[int, ...]) -> int:
    """Bytes of these storages."""
    return int(trace.nbytes[list(storages)].sum()) if storages else 0


def border_bytes(trace: Trace, call: Call) -> tuple[int, int]:
    """Bytes of a call's inputs and outputs."""
    return call_bytes(trace, call.inputs), call_bytes(trace, call.outputs)
