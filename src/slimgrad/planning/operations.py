"""A block call's operations as a graph, and the replay of those that are run again when backward asks.

The replay does what ``methods/activations/operation_tape.py`` does, on the trace: when a storage that was let go is
asked for, the operations that make it run; what they make is held while anyone will ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from slimgrad.measuring.trace import Trace
from slimgrad.method import OperationGraph


@dataclass(frozen=True)
class CallOperations:
    """One call's graph, and which storages and ticks of the trace its numbers stand for."""

    graph: OperationGraph
    storages: tuple[int, ...]
    outside: tuple[
        tuple[int, ...], ...
    ]  # for each operation, the storages from outside that it reads
    asked_at: dict[
        int, int
    ]  # number of a saved storage -> the tick at which backward first reads it


@dataclass
class Replayed:
    """What changes in backward when a call keeps only some storages. Ticks are those of the trace."""

    again: list[tuple[int, int, int]] = field(default_factory=list)  # storage, made at, gone at
    bursts: list[tuple[int, int]] = field(
        default_factory=list
    )  # tick, bytes above what stays after it
    held: dict[int, int] = field(
        default_factory=dict
    )  # storage -> tick until which a recipe holds it


def first_reads(trace: Trace) -> dict[int, int]:
    """For each storage, the tick at which backward first reads it."""
    found: dict[int, int] = {}
    if not trace.reads:
        return found
    for index in np.flatnonzero(trace.op_backward):
        for storage in trace.reads[index]:
            found.setdefault(storage, int(index) + 1)
    return found


def call_operations(
    trace: Trace, index: int, saved: Sequence[int], asked: dict[int, int]
) -> CallOperations:
    """The operations of call ``index``, which saves the storages ``saved``."""
    call = trace.calls[index]
    inside = np.flatnonzero((trace.birth > call.forward_from) & (trace.birth <= call.forward_to))
    made = sorted((int(s) for s in inside), key=lambda s: (int(trace.birth[s]), s))
    number = {s: i for i, s in enumerate(made)}
    first = int(call.forward_from)
    operations: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    outside: list[tuple[int, ...]] = []
    for tick in range(first, int(call.forward_to)):
        reads, writes = trace.reads[tick], trace.writes[tick]
        seconds = float(trace.op_seconds[tick]) if trace.op_seconds.size else 0.0
        own = tuple(number[s] for s in writes if s in number)
        if own:
            operations.append((seconds, tuple(number[s] for s in reads if s in number), own))
            outside.append(tuple(s for s in reads if s not in number))
    dropped = {s for s in saved if s in asked}
    graph = OperationGraph(
        tuple(int(trace.nbytes[s]) for s in made),
        tuple(s in dropped for s in made),
        tuple(operations),
    )
    return CallOperations(
        graph, tuple(made), tuple(outside), {number[s]: asked[s] for s in made if s in dropped}
    )


def merged(graphs: Sequence[OperationGraph]) -> OperationGraph | None:
    """One graph for all calls of a block, its bytes and mean seconds; None where they do different things."""
    shapes = {(g.is_saved, tuple(o[1:] for o in g.operations)) for g in graphs}
    if len(shapes) != 1:
        return None
    operations = zip(*(g.operations for g in graphs), strict=True)
    return OperationGraph(
        tuple(map(max, zip(*(g.num_bytes for g in graphs), strict=True))),
        graphs[0].is_saved,
        tuple((float(np.mean([o[0] for o in same])), *same[0][1:]) for same in operations),
    )


def replayed(trace: Trace, call: CallOperations, keep: Sequence[int]) -> Replayed:
    """What is made again, when, and for how long, if the call keeps the storages with the numbers ``keep``."""
    graph, kept, out = call.graph, frozenset(keep), Replayed()
    dropped = [s for s, saved in enumerate(graph.is_saved) if saved and s not in kept]
    due = set(graph.recipe(dropped, kept))
    asks = [0] * len(graph.num_bytes)
    for storage in dropped:
        asks[storage] += 1
    for operation in due:
        for storage in set(graph.operations[operation][1]) - set(graph.operations[operation][2]):
            asks[storage] += 1
    memo: dict[int, int] = {}  # storage -> the tick at which it was made again
    pending = set(dropped)
    for wanted in sorted(dropped, key=lambda s: call.asked_at[s]):
        tick = call.asked_at[wanted]
        if wanted not in memo:
            _burst(call, wanted, tick, kept, memo, asks, pending, due, out)
        pending.discard(wanted)
    deaths = {s: int(trace.death[call.storages[s]]) for s in dropped}
    out.again += [(call.storages[s], memo[s], deaths[s]) for s in dropped if s in memo]
    last = max(deaths.values(), default=0)
    for operation in due:
        for storage in call.outside[operation]:
            out.held[storage] = last
        for storage in graph.operations[operation][1]:
            if storage in kept:
                out.held[call.storages[storage]] = last
    return out


def _burst(
    call: CallOperations,
    wanted: int,
    tick: int,
    kept: frozenset[int],
    memo: dict[int, int],
    asks: list[int],
    pending: set[int],
    due: set[int],
    out: Replayed,
) -> None:
    """Run what makes ``wanted``; ``memo`` gains what stays, ``out`` what was above it for a moment."""
    graph, live, peak = call.graph, 0, 0
    before = set(memo)
    for index in graph.recipe([wanted], kept | before):
        _, reads, writes = graph.operations[index]
        for storage in dict.fromkeys(writes):
            if storage not in kept and storage not in memo:
                memo[storage] = tick
                live += graph.num_bytes[storage]
        peak = max(peak, live)
        unwanted = [s for s in writes if s in memo and asks[s] <= 0]
        if index in due:
            due_reads = set(reads) - set(writes)
            for storage in due_reads:
                asks[storage] -= 1
            unwanted += [s for s in due_reads if s in memo and asks[s] <= 0]
        for storage in dict.fromkeys(unwanted):
            if storage in pending:
                continue
            made_at = memo.pop(storage)
            live -= graph.num_bytes[storage]
            if made_at < tick:
                out.again.append((call.storages[storage], made_at, tick))
    after = sum(graph.num_bytes[s] for s in memo if memo[s] == tick and s not in before)
    if peak > after:
        out.bursts.append((tick, peak - after))
