"""What blocks in a row that are run again as modules do in backward, on the trace: the rules of ``repeated_modules``.

A stage is one of the blocks. What a stage's backward asks for is held from when the stage is run again until it is
asked, or until the schedule lets go of it; what else a run makes is live while it goes on, as in the first one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from slimgrad.measuring.trace import Trace
from slimgrad.method import OperationGraph
from slimgrad.methods.activations.repeated_modules import STAGE_S
from slimgrad.methods.activations.schedules import holdings
from slimgrad.planning.operations import CallOperations, Reads
from slimgrad.planning.replay import Replayed


@dataclass(frozen=True)
class Stages:
    """Blocks in a row that can be run again as they are. Storages by their number in the graph, ticks from ``first`` on.

    ``asked``: for each stage, (storage, first asked for at, gone at) of what its backward asks for. ``inputs`` and
    ``outputs``: what it takes from the stage before, and returns. ``gone_after``: for each storage, the operation after
    which its forward pass has no use for it; -1: when the stage is over.
    """

    asked: tuple[tuple[tuple[int, int, int], ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    gone_after: tuple[int, ...]
    first: int


def stages_of(
    trace: Trace, calls: Sequence[int], operations: CallOperations, reads: Reads
) -> Stages | None:
    """The stages of ``calls``; None where blocks have to be run again operation by operation.

    That is where a block writes into what it is given or takes what an earlier one returned, where something is done
    between two, and where the rest of the step needs what they make, or their backward what the last one returns.
    """
    if operations.held_anyway or trace.cached or not _is_closed(trace, calls, reads):
        return None
    number = {s: i for i, s in enumerate(operations.storages)}
    stage_of = {s: k for k, call in enumerate(calls) for s in trace.calls[call].outputs}
    inputs: list[tuple[int, ...]] = []
    for k, call in enumerate(calls):
        mine = tuple(s for s in trace.calls[call].inputs if s in number)
        if any(stage_of.get(s) != k - 1 for s in mine):
            return None
        inputs.append(tuple(number[s] for s in mine))
    is_saved, asked = operations.graph.is_saved, list[list[tuple[int, int, int]]]()
    last_asked = dict[int, int]()  # storage -> the last tick at which a stage's backward reads it
    for call in calls:
        found = reads.by_call.get(call, {})
        if any(s in number and not is_saved[number[s]] for s in found):
            return None
        mine = [
            (number[s], *span) for s, span in found.items() if s in number and is_saved[number[s]]
        ]
        asked.append(mine)
        for storage, _, last in mine:
            last_asked[storage] = max(last_asked.get(storage, 0), last)
    first = min((a[1] for mine in asked for a in mine), default=0)
    ended = tuple(
        tuple(
            (s, start - first,
             (int(trace.death[operations.storages[s]]) if last == last_asked[s] else last + 1) - first)
            for s, start, last in sorted(mine)
        )
        for mine in asked
    )  # fmt: skip
    outputs = tuple(tuple(number[s] for s in trace.calls[c].outputs if s in number) for c in calls)
    return Stages(
        ended, tuple(inputs), outputs, _gone_after(trace, calls, operations, reads), first
    )


def _is_closed(trace: Trace, calls: Sequence[int], reads: Reads) -> bool:
    """Whether nothing is done between the blocks, and each writes only into what it made."""
    for before, call in itertools.pairwise(calls):
        if trace.calls[before].forward_to != trace.calls[call].forward_from:
            return False
    return all(reads.writes_inside(trace, call).are_all for call in calls)


def _gone_after(
    trace: Trace, calls: Sequence[int], operations: CallOperations, reads: Reads
) -> tuple[int, ...]:
    """For each storage that goes while its block still runs, the operation after which it does."""
    ticks = [t for call in calls for t in reads.writes_inside(trace, call).ticks]
    ends = [trace.calls[call].forward_to for call in calls]
    storages = list(operations.storages)
    births, deaths = trace.birth[storages], trace.death[storages]
    stops = np.array(ends)[np.searchsorted(ends, births)]
    return tuple(np.where(deaths <= stops, np.searchsorted(ticks, deaths - 1), -1).tolist())


def repeated(stages: Stages, operations: CallOperations, schedule: tuple[int, ...]) -> Replayed:
    """The backward pass of blocks that are run again as modules. Blocks that do the same share one replay."""
    modules = _repeated(operations.graph.untimed, replace(stages, first=0), schedule)
    first = stages.first
    held = {s: modules.last + first for outside in operations.outside for s in outside}
    return Replayed(
        np.add(modules.rows, (0, first, first)),
        [(tick + first, nbytes) for tick, nbytes in modules.bursts],
        held,
        float(operations.graph.seconds[modules.ran].sum()) + modules.num_runs * STAGE_S,
    )


@functools.lru_cache(maxsize=4096)
def _repeated(graph: OperationGraph, stages: Stages, schedule: tuple[int, ...]) -> _Modules:
    return _Modules(graph, stages, schedule)


@dataclass(slots=True)
class _Copy:
    """A storage as one run made it."""

    number: int
    made_at: int
    num_holders: int = 0
    gone_at: int = 0


class _Modules:
    """``RepeatedModules`` while backward goes on."""

    def __init__(self, graph: OperationGraph, stages: Stages, schedule: tuple[int, ...]) -> None:
        self.graph, self.stages = graph, stages
        self.holdings = holdings(schedule, graph.num_stages)
        self.operations: list[list[int]] = [[] for _ in range(graph.num_stages)]
        for index in range(len(graph.operations)):
            self.operations[graph.stage_of(index)].append(index)
        # operation (-1: none) -> the storages that go after it
        self.going: dict[int, list[int]] = {}
        for storage, index in enumerate(stages.gone_after):
            self.going.setdefault(index, []).append(storage)
        self.saved: dict[int, dict[int, _Copy]] = {}
        self.inputs: dict[int, list[_Copy]] = {}
        self.last = max((a[2] for asked in stages.asked for a in asked), default=0)
        self.again: list[tuple[int, int, int]] = []
        self.bursts: list[tuple[int, int]] = []
        self._ran: list[int] = []
        self.num_runs = self.live = self.peak = 0
        for tick, stage, storage, gone in sorted(
            (tick, stage, storage, gone)
            for stage, asked in enumerate(stages.asked)
            for storage, tick, gone in asked
        ):
            if storage not in self.saved.get(stage, {}):
                self._make(stage, tick)
            self._release(self.saved[stage].pop(storage), gone)
        for held in (
            *self.saved.values(),
            *({c.number: c for c in i} for i in self.inputs.values()),
        ):
            for copy in held.values():
                self._release(copy, self.last)
        self.rows = np.array(self.again, dtype=int).reshape(-1, 3)
        self.ran = np.array(self._ran, dtype=int)  # operations, by their index

    def _release(self, copy: _Copy, tick: int) -> None:
        copy.num_holders -= 1
        copy.gone_at = max(copy.gone_at, tick)
        if copy.num_holders == 0 and copy.made_at < copy.gone_at:
            self.again.append((copy.number, copy.made_at, copy.gone_at))

    def _make(self, asked: int, tick: int) -> None:
        holding = self.holdings[asked]
        for stage in [s for s in self.saved if s not in holding.stages]:
            for copy in self.saved.pop(stage).values():
                self._release(copy, tick)
        for stage in [s for s in self.inputs if s not in holding.borders]:
            for copy in self.inputs.pop(stage):
                self._release(copy, tick)
        wanted = {s for s in holding.stages if s <= asked and s not in self.saved} | {asked}
        borders = {
            b for b in holding.borders
            if b <= asked and b not in self.inputs and self.stages.inputs[b]
        }  # fmt: skip
        start = min(wanted | borders)
        while start > 0 and start not in self.inputs and self.stages.inputs[start]:
            start -= 1
        self.live = self.peak = 0
        made = {copy.number: copy for copy in self.inputs.get(start, ())}
        before: list[_Copy] = []
        for stage in range(start, asked + 1):
            if stage in borders:
                self.inputs[stage] = [self._held(made[s]) for s in self.stages.inputs[stage]]
            before = self._run(stage, tick, made, before, hold=stage in wanted)
        for copy in before:
            self._drop(copy)
        if self.peak > self.live:
            self.bursts.append((tick, self.peak - self.live))

    def _run(
        self, stage: int, tick: int, made: dict[int, _Copy], before: list[_Copy], *, hold: bool
    ) -> list[_Copy]:
        """One stage again; what the stage before returned goes when it is over. The copies that it returns."""
        wanted = {a[0] for a in self.stages.asked[stage]} if hold else set[int]()
        if hold:
            self.saved[stage] = {s: self._held(made[s]) for s in wanted if s in made}
        inside: dict[int, _Copy] = {}
        operations, num_bytes = self.graph.operations, self.graph.num_bytes
        self._ran += self.operations[stage]
        for index in self.operations[stage]:
            for storage in operations[index][2]:
                if storage not in made:
                    copy = made[storage] = inside[storage] = _Copy(storage, tick, 1)
                    self.live += num_bytes[storage]
                    if storage in wanted:
                        self.saved[stage][storage] = self._held(copy)
            self.peak = max(self.peak, self.live)
            for storage in self.going.get(index, ()):
                if storage in inside:
                    self._drop(inside.pop(storage))
        self.num_runs += 1
        returned = self.stages.outputs[stage]
        for copy in before:
            self._drop(copy)
        for copy in inside.values():
            if copy.number not in returned:
                self._drop(copy)
        return [copy for copy in inside.values() if copy.number in returned]

    def _held(self, copy: _Copy) -> _Copy:
        copy.num_holders += 1
        return copy

    def _drop(self, copy: _Copy) -> None:
        """The run has no more use for it."""
        copy.num_holders -= 1
        if copy.num_holders == 0:
            self.live -= self.graph.num_bytes[copy.number]
