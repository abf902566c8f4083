"""What an operation tape does in backward, on the trace: what is made again, when, and for how long.

The same rules as in ``methods/activations/operation_tape.py``, with storages in place of values: when a storage that
was let go is asked for, the operations that make it run; what they make is held while the schedule says so. What was
moved is read back when it is asked for, or when an operation reads it; the next one is already being read.
"""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slimgrad.measuring.trace import Trace
from slimgrad.method import OperationGraph
from slimgrad.methods.activations.schedules import Holding, holdings
from slimgrad.methods.activations.values import RUN_S
from slimgrad.planning.operations import CallOperations


@dataclass(frozen=True)
class Replayed:
    """What changes in backward when calls keep only some storages. Ticks are those of the trace.

    ``again``: rows of (storage, made at, gone at), storages by their number. ``bursts``: (tick, bytes above what stays after
    it). ``held``: storage of the trace -> the tick until which it is held for operations to be run again.
    """

    again: np.ndarray
    bursts: list[tuple[int, int]]
    held: dict[int, int]
    seconds: float
    num_reads: int = 0  # of storages that were moved, read back
    read_bytes: int = 0


def replayed(
    trace: Trace,
    call: CallOperations,
    keep: tuple[int, ...],
    schedule: tuple[int, ...] = (),
    move: tuple[int, ...] = (),
    coded: tuple[int, ...] = (),
) -> Replayed:
    """The backward pass of a call that keeps the storages with the numbers ``keep``, moves some and keeps others as
    codes, under a schedule.

    Calls that do the same, and whose backward asks in the same way, share one replay, however long they take.
    """
    kept, saved = frozenset(keep), call.graph.is_saved
    asked = {s: t for s, t in call.asked_at.items() if saved[s] and s not in kept}
    first = min(asked.values(), default=0)
    ticks = tuple(
        (s, tick - first, int(trace.death[call.storages[s]]) - first)
        for s, tick in sorted(asked.items())
    )
    moved, decoded = frozenset(move).intersection(asked), frozenset(coded).intersection(asked)
    tape = _tape(call.graph.untimed, kept, moved, decoded, schedule, ticks)
    last, operations = tape.last + first, call.graph.operations
    held = {storage: last for index in tape.needed for storage in call.outside[index]}
    reads = {s for index in tape.needed for s in operations[index][1]} & kept
    held |= {call.storages[s]: last for s in reads}
    return Replayed(
        np.add(tape.rows, (0, first, first)),
        [(tick + first, nbytes) for tick, nbytes in tape.bursts],
        held,
        float(call.graph.seconds[tape.ran].sum()) + len(tape.ran) * RUN_S,
        tape.num_reads,
        tape.read_bytes,
    )


@functools.lru_cache(maxsize=4096)
def _tape(
    graph: OperationGraph,
    keep: frozenset[int],
    move: frozenset[int],
    coded: frozenset[int],
    schedule: tuple[int, ...],
    ticks: tuple[tuple[int, int, int], ...],
) -> _Tape:
    return _Tape(graph, keep, move, coded, schedule, ticks)


class _Tape:
    """A tape while backward goes on: ``ticks`` are (storage that was let go, asked for at, gone at)."""

    def __init__(
        self,
        graph: OperationGraph,
        keep: frozenset[int],
        move: frozenset[int],
        coded: frozenset[int],
        schedule: Sequence[int],
        ticks: Sequence[tuple[int, int, int]],
    ) -> None:
        self.graph, self.keep, self.coded = graph, keep, coded
        move = self.move = move | coded  # both come back without an operation
        self.holdings = holdings(schedule, graph.num_stages)
        self.death = {s: gone for s, _, gone in ticks}
        self.pending = set(self.death)  # not asked for yet
        self.last = max((gone for s, gone in self.death.items() if s not in move), default=0)
        self.needed = graph.recipe(self.death, keep | move)
        self.stage = dict.fromkeys(range(len(graph.num_bytes)), 0)
        self.last_stage = dict(self.stage)
        for index in reversed(range(len(graph.operations))):
            for storage in graph.operations[index][2]:
                self.stage[storage] = graph.stage_of(index)
        self.last_stage |= self.stage
        self.asked_of: dict[int, list[int]] = {}  # stage -> what backward asks for of it
        for storage in self.death:
            self.asked_of.setdefault(self.stage[storage], []).append(storage)
        for index in self.needed:
            for storage in graph.operations[index][1]:
                stage = graph.stage_of(index)
                self.last_stage[storage] = max(self.last_stage[storage], stage)
        self.holding: Holding | None = None
        self.due: set[int] = set()
        self.num_due: Counter[int] = Counter()
        self.memo: dict[int, int] = {}  # storage -> the tick at which it was made again
        self.here = set(keep)  # what is kept, and what was made again and is held
        self.sources = set(keep | move)  # and what can be read back
        self.ahead: dict[int, int] = {}  # storage -> the tick at which it began to be read
        self.num_reads = self.read_bytes = 0
        self.deaths: list[tuple[int, int]] = []  # (tick, storage) of what was made again, a heap
        self.overdue: set[int] = set()  # held for other operations beyond that
        self.again: list[tuple[int, int, int]] = []
        self.bursts: list[tuple[int, int]] = []
        self._ran: list[int] = []
        in_order = sorted(ticks, key=lambda t: t[1])
        self.to_read = [s for s, _, _ in in_order if s in move and s not in coded]
        for wanted, tick, _ in in_order:
            self._ask(wanted, tick)
        for storage in list(self.memo):
            is_asked = storage in self.death and not self._is_held(storage)
            self._let_go(storage, self.death[storage] if is_asked else self.last)
        self.rows = np.array(self.again, dtype=int).reshape(-1, 3)
        self.ran = np.array(self._ran, dtype=int)  # operations, by their index

    def _ask(self, wanted: int, tick: int) -> None:
        """Backward asks for ``wanted``."""
        while self.deaths and self.deaths[0][0] <= tick:
            self.overdue.add(heapq.heappop(self.deaths)[1])
        for storage in sorted(self.overdue):
            if storage not in self.memo:
                self.overdue.discard(storage)
            elif not self._is_held(storage):
                self.overdue.discard(storage)
                self._let_go(storage, self.death[storage])
        if wanted not in self.memo:
            self._turn_to(self.stage[wanted], tick)
            self._read_ahead(wanted, tick)
            if wanted in self.move:
                self._fetch(wanted, tick)
            else:
                self._burst(wanted, tick)
        self.pending.discard(wanted)

    def _let_go(self, storage: int, tick: int) -> None:
        made_at = self.memo.pop(storage)
        self.here.discard(storage)
        if storage not in self.move:
            self.sources.discard(storage)
        if made_at < tick:
            self.again.append((storage, made_at, tick))

    def _is_held(self, storage: int) -> bool:
        """Whether it is held for other operations."""
        if self.holding is None:
            return False
        crosses = self.holding.crosses(self.stage[storage], self.last_stage[storage])
        return crosses or self.num_due[storage] > 0

    def _is_wanted(self, storage: int) -> bool:
        assert self.holding is not None
        is_asked_soon = storage in self.death and self.stage[storage] in self.holding.stages
        return is_asked_soon or self._is_held(storage)

    def _reads(self, index: int) -> set[int]:
        _, reads, writes = self.graph.operations[index]
        return set(reads) - set(writes)

    def _turn_to(self, stage: int, tick: int) -> None:
        holding = self.holdings[stage]
        if self.holding is holding:
            return
        self.holding = holding
        self.due.clear()
        self.num_due.clear()
        asked = [s for s in self.memo if s in self.death and s not in self.pending]
        for storage in [s for s in self.memo if s not in asked and not self._is_wanted(s)]:
            self._let_go(storage, tick)
        wanted = [
            s for place in holding.stages for s in self.asked_of.get(place, ()) if s in self.pending
        ]
        for index in self.graph.recipe(wanted, self.sources):
            if self.graph.stage_of(index) in holding.stages:
                self._becomes_due(index)

    def _becomes_due(self, index: int) -> None:
        if index not in self.due:
            self.due.add(index)
            self.num_due.update(self._reads(index))

    def _burst(self, wanted: int, tick: int) -> None:
        """Run what makes ``wanted``; ``memo`` gains what stays, ``bursts`` what was above it for a moment."""
        graph, live, peak, added = self.graph, 0, 0, set[int]()
        recipe = graph.recipe([wanted], self.sources)
        for index in recipe:
            self._becomes_due(index)
        for index in recipe:
            self._ran.append(index)
            for storage in (self._reads(index) & self.move) - self.here:
                if storage not in self.ahead:
                    added.add(storage)
                    live += graph.num_bytes[storage]
                self._fetch(storage, tick)
            for storage in dict.fromkeys(graph.operations[index][2]):
                if storage not in self.here:
                    self._hold(storage, tick)
                    added.add(storage)
                    live += graph.num_bytes[storage]
            peak = max(peak, live)
            self.due.discard(index)
            self.num_due.subtract(self._reads(index))
            for storage in {*graph.operations[index][2], *self._reads(index)}:
                is_memo = storage in self.memo and storage != wanted
                if is_memo and not self._is_wanted(storage):
                    live -= graph.num_bytes[storage]
                    self._let_go(storage, tick)
        after = sum(graph.num_bytes[s] for s in added if s in self.memo)
        if peak > after:
            self.bursts.append((tick, peak - after))

    def _read_ahead(self, wanted: int, tick: int) -> None:
        """What backward will ask for next of what was moved is being read while it goes on."""
        for storage in self.to_read:
            if storage in self.pending and storage != wanted and storage not in self.here:
                self.ahead.setdefault(storage, tick)
                return

    def _fetch(self, storage: int, tick: int) -> None:
        if storage not in self.coded:
            self.num_reads += 1
            self.read_bytes += self.graph.num_bytes[storage]
        self._hold(storage, self.ahead.pop(storage, tick))

    def _hold(self, storage: int, tick: int) -> None:
        self.memo[storage] = tick
        self.here.add(storage)
        self.sources.add(storage)
        if storage in self.death:
            heapq.heappush(self.deaths, (self.death[storage], storage))
