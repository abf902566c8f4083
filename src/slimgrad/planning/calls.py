"""The calls of a traced step's blocks: what they save, how long they take; and changes to a step's lifetimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from slimgrad.measuring.trace import Call, Trace


@dataclass
class Changes:
    """Lifetimes that start (+) or end (-) at slots, each with its column."""

    slot: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    column: list[int] = field(default_factory=list)

    def span(self, start: int, stop: int, nbytes: float, column: int) -> None:
        """``nbytes`` live in slots ``start`` to ``stop`` (negative: no longer live there)."""
        if start < stop and nbytes:
            self.slot += [start, stop]
            self.nbytes += [int(nbytes), -int(nbytes)]
            self.column += [column, column]

    def extend(self, other: Changes) -> None:
        """Add another set."""
        self.slot += other.slot
        self.nbytes += other.nbytes
        self.column += other.column


@dataclass(frozen=True)
class BlockLayout:
    """The calls of one block, and what it saves inside."""

    path: str
    calls: tuple[int, ...]
    saved: Mapping[int, tuple[int, ...]]  # call -> storages its backward needs, made inside


def call_seconds(trace: Trace, calls: tuple[int, ...], *, backward: bool) -> float:
    """Seconds of the operations of these calls, forward or backward."""
    mine = np.isin(trace.op_call, calls) & (trace.op_backward == backward)
    return float(trace.op_seconds[mine].sum()) if trace.op_seconds.size else 0.0


def call_bytes(trace: Trace, storages: tuple[int, ...]) -> int:
    """Bytes of these storages."""
    return int(trace.nbytes[list(storages)].sum()) if storages else 0


def border_bytes(trace: Trace, call: Call) -> tuple[int, int]:
    """Bytes of a call's inputs and outputs."""
    return call_bytes(trace, call.inputs), call_bytes(trace, call.outputs)
