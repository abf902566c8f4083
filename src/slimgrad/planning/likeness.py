"""Whether blocks are the same in two traced steps, so that what is known of the one's holds of the other's.

A rewritten loss leaves blocks as they are: the same operations on the same storages in the same order, at other ticks
and under other numbers. ``blocks_of`` has the same digest for two steps where that is so.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimgrad.measuring.trace import Trace
from slimgrad.planning.calls import BlockLayout
from slimgrad.planning.operations import CallOperations, Reads
from slimgrad.planning.replay import Replayed


@dataclass(frozen=True)
class Blocks:
    """What all blocks of a trace do: a digest of it, and which storages and ticks of the trace it is about."""

    digest: bytes
    storages: tuple[int, ...]
    ticks: np.ndarray


class Translation:
    """From the storages and ticks of one trace to those of another with the same digest."""

    def __init__(self, known: Blocks, other: Blocks) -> None:
        self._storages = dict(zip(known.storages, other.storages, strict=True))
        self._from, self._to = known.ticks, other.ticks

    def block(self, block: BlockLayout) -> BlockLayout:
        """The same blocks in the other trace."""
        saved = {call: self._moved(storages) for call, storages in block.saved.items()}
        return replace(block, saved=saved)

    def operations(self, operations: CallOperations) -> CallOperations:
        """The same operations in the other trace."""
        return replace(
            operations,
            storages=self._moved(operations.storages),
            outside=tuple(map(self._moved, operations.outside)),
            asked_at=dict(
                zip(operations.asked_at, self._later(operations.asked_at.values()), strict=True)
            ),
            gone_at=tuple(self._later(operations.gone_at)),
        )

    def replayed(self, replayed: Replayed) -> Replayed:
        """What the same blocks make again in the other trace."""
        ticks, held = [tick for tick, _ in replayed.bursts], replayed.held
        again = replayed.again.copy()
        again[:, 1:] = self._ticks(again[:, 1:])
        return replace(
            replayed,
            again=again,
            bursts=[(t, b) for t, (_, b) in zip(self._later(ticks), replayed.bursts, strict=True)],
            held=dict(zip(self._moved(held), self._later(held.values()), strict=True)),
        )

    def _moved(self, storages: Iterable[int]) -> tuple[int, ...]:
        return tuple(map(self._storages.__getitem__, storages))

    def _later(self, ticks: Collection[int]) -> list[int]:
        return self._ticks(np.fromiter(ticks, dtype=np.int64, count=len(ticks))).tolist()

    def _ticks(self, ticks: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self._from, ticks)
        assert np.array_equal(self._from[place], ticks)
        return self._to[place]


def blocks_of(trace: Trace, reads: Reads) -> Blocks:
    """All in a trace that offers for blocks hang on; no tick and no storage by its own number.

    Storages are numbered anew: those that blocks make in forward, in their order, then others that blocks read. Of
    ticks outside blocks only their order is told, and whether any lies between two blocks' forward passes.
    """
    inside = np.flatnonzero(trace.op_call >= 0)
    made = _made_in_forward(trace)
    number = {s: i for i, s in enumerate(made)}
    others = [c for call in trace.calls for c in (*call.inputs, *call.outputs)]
    if trace.reads:
        others += [s for t in inside.tolist() for s in (*trace.reads[t], *trace.writes[t])]
    for storage in others:
        number.setdefault(storage, len(number))
    known = _ticks(trace, inside, _events(trace, reads, made))
    order = np.searchsorted(known, np.arange(int(known.max(initial=0)) + 1))
    digest = hashlib.blake2b()
    for part in _parts(trace, reads, inside, number, made, order):
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        digest.update(b";")
    return Blocks(digest.digest(), tuple(number), known)


def _made_in_forward(trace: Trace) -> list[int]:
    is_made = np.zeros(len(trace.birth), dtype=bool)
    for call in trace.calls:
        is_made |= (trace.birth > call.forward_from) & (trace.birth <= call.forward_to)
    return np.flatnonzero(is_made).tolist()


def _events(trace: Trace, reads: Reads, made: Sequence[int]) -> Iterator[int]:
    """Ticks at which something happens to what blocks make, or a block's forward begins or ends."""
    for storage in made:
        yield reads.first_backward.get(storage, 0)
        yield reads.last_forward.get(storage, 0)
    for call in trace.calls:
        yield call.forward_from
        yield call.forward_to
    for tick in trace.cached.values():
        yield tick - 1
    yield from trace.birth[made].tolist()
    yield from trace.death[made].tolist()


def _ticks(trace: Trace, inside: np.ndarray, events: Iterable[int]) -> np.ndarray:
    """The ticks at which something happens, and those right after."""
    ticks = np.concatenate((inside, inside + 1, np.fromiter(events, dtype=np.int64)))
    return np.unique(np.concatenate((ticks, ticks + 1)))


def _parts(
    trace: Trace,
    reads: Reads,
    inside: np.ndarray,
    number: Mapping[int, int],
    made: Sequence[int],
    order: np.ndarray,
) -> Iterator[object]:
    known, calls = list(number), trace.calls
    yield [c.path for c in calls]
    yield [(order[c.forward_from], order[c.forward_to]) for c in calls]
    yield [b.forward_from == a.forward_to for a, b in itertools.pairwise(calls)]
    yield from _numbered(number, [c.inputs for c in calls])
    yield from _numbered(number, [c.outputs for c in calls])
    yield order[inside]
    yield trace.op_call[inside]
    yield trace.op_backward[inside]
    yield trace.op_seconds[inside] if trace.op_seconds.size else ""
    yield [trace.names[i] for i in trace.name[inside].tolist()] if len(trace.name) else ""
    yield trace.op_node[inside] == trace.op_node[inside - 1] if len(trace.op_node) else ""
    if trace.reads:
        yield from _numbered(number, [trace.reads[tick] for tick in inside.tolist()])
        yield from _numbered(number, [trace.writes[tick] for tick in inside.tolist()])
    yield trace.nbytes[known]
    yield trace.column[known]
    yield trace.row[known] if len(trace.row) else ""
    yield [trace.dtypes[s] for s in known] if trace.dtypes else ""
    yield order[trace.birth[made]]
    yield order[trace.death[made]]
    yield order[[reads.first_backward.get(s, 0) for s in made]]
    yield order[[reads.last_forward.get(s, 0) for s in made]]
    yield [sorted(reads.callers.get(s, ())) for s in made]
    yield [sorted(reads.readers.get(s, ())) for s in made]
    yield [(number[s], order[tick - 1]) for s, tick in trace.cached.items() if s in number]


def _numbered(number: Mapping[int, int], storages: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Sequences of storages by their new numbers, one after the other, and how long each is."""
    yield np.array([number[s] for some in storages for s in some], dtype=np.int64)
    yield np.array([len(some) for some in storages], dtype=np.int64)
