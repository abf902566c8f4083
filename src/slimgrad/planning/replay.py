"""What an operation tape does in backward, on the trace: what is made again, when, and for how long.

The same rules as in ``methods/activations/operation_tape.py``, with storages in place of values: when a storage that
was let go is asked for, the operations that make it run; what they make is held while the schedule says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from slimgrad.measuring.trace import Trace
from slimgrad.methods.activations.schedules import Holding, holdings
from slimgrad.methods.activations.values import RUN_S
from slimgrad.planning.operations import CallOperations


@dataclass
class Replayed:
    """What changes in backward when calls keep only some storages. Ticks are those of the trace.

    ``again``: (storage, made at, gone at), storages by their number. ``bursts``: (tick, bytes above what stays after
    it). ``held``: storage of the trace -> the tick until which it is held for operations to be run again.
    """

    again: list[tuple[int, int, int]] = field(default_factory=list)
    bursts: list[tuple[int, int]] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0


def replayed(
    trace: Trace, call: CallOperations, keep: Collection[int], schedule: Sequence[int] = ()
) -> Replayed:
    """The backward pass of a call that keeps the storages with the numbers ``keep``, under a schedule."""
    tape = _Tape(trace, call, frozenset(keep), holdings(schedule, call.graph.num_stages))
    for wanted in sorted(tape.pending, key=lambda s: call.asked_at[s]):
        tape.ask(wanted, call.asked_at[wanted])
    return tape.finished()


class _Tape:
    """The state of a tape while backward goes on."""

    def __init__(
        self, trace: Trace, call: CallOperations, keep: frozenset[int], held: list[Holding]
    ) -> None:
        self.call, self.graph, self.keep, self.holdings = call, call.graph, keep, held
        graph = call.graph
        self.dropped = [s for s, saved in enumerate(graph.is_saved) if saved and s not in keep]
        self.pending = set(self.dropped)  # not asked for yet
        self.death = {s: int(trace.death[call.storages[s]]) for s in self.dropped}
        self.needed = graph.recipe(self.dropped, keep)
        self.stage = dict.fromkeys(range(len(graph.num_bytes)), 0)
        self.last_stage = dict(self.stage)
        for index in reversed(range(len(graph.operations))):
            for storage in graph.operations[index][2]:
                self.stage[storage] = graph.stage_of(index)
        self.last_stage |= self.stage
        for index in self.needed:
            for storage in graph.operations[index][1]:
                stage = graph.stage_of(index)
                self.last_stage[storage] = max(self.last_stage[storage], stage)
        self.holding: Holding | None = None
        self.due: set[int] = set()
        self.num_due: Counter[int] = Counter()
        self.memo: dict[int, int] = {}  # storage -> the tick at which it was made again
        self.out = Replayed()

    def ask(self, wanted: int, tick: int) -> None:
        """Backward asks for ``wanted``."""
        for storage in [s for s in self.memo if self.death.get(s, tick + 1) <= tick]:
            if not self._is_held(storage):
                self._let_go(storage, self.death[storage])
        if wanted not in self.memo:
            self._turn_to(self.stage[wanted], tick)
            self._burst(wanted, tick)
        self.pending.discard(wanted)

    def finished(self) -> Replayed:
        """Everything was asked for."""
        last = max(self.death.values(), default=0)
        for storage in list(self.memo):
            is_asked = storage in self.death and not self._is_held(storage)
            self._let_go(storage, self.death[storage] if is_asked else last)
        for index in self.needed:
            for storage in self.call.outside[index]:
                self.out.held[storage] = last
            for storage in self.graph.operations[index][1]:
                if storage in self.keep:
                    self.out.held[self.call.storages[storage]] = last
        return self.out

    def _let_go(self, storage: int, tick: int) -> None:
        made_at = self.memo.pop(storage)
        if made_at < tick:
            self.out.again.append((storage, made_at, tick))

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
        wanted = [s for s in self.pending if self.stage[s] in holding.stages]
        for index in self.graph.recipe(wanted, self.keep | self.memo.keys()):
            if self.graph.stage_of(index) in holding.stages:
                self._becomes_due(index)

    def _becomes_due(self, index: int) -> None:
        if index not in self.due:
            self.due.add(index)
            self.num_due.update(self._reads(index))

    def _burst(self, wanted: int, tick: int) -> None:
        """Run what makes ``wanted``; ``memo`` gains what stays, ``out`` what was above it for a moment."""
        graph, live, peak, before = self.graph, 0, 0, set(self.memo)
        recipe = graph.recipe([wanted], self.keep | before)
        for index in recipe:
            self._becomes_due(index)
        for index in recipe:
            self.out.seconds += graph.operations[index][0] + RUN_S
            for storage in dict.fromkeys(graph.operations[index][2]):
                if storage not in self.keep and storage not in self.memo:
                    self.memo[storage] = tick
                    live += graph.num_bytes[storage]
            peak = max(peak, live)
            self.due.discard(index)
            self.num_due.subtract(self._reads(index))
            for storage in {*graph.operations[index][2], *self._reads(index)}:
                is_memo = storage in self.memo and storage != wanted
                if is_memo and not self._is_wanted(storage):
                    live -= graph.num_bytes[storage]
                    self._let_go(storage, tick)
        after = sum(
            graph.num_bytes[s] for s, t in self.memo.items() if t == tick and s not in before
        )
        if peak > after:
            self.out.bursts.append((tick, peak - after))
