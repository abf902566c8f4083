"""The operations of a block's call, or of several blocks' in a row, as a graph."""

from __future__ import annotations

import bisect
from collections.abc import Container, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from slimgrad.code import Use, origin_after
from slimgrad.measuring.trace import Trace
from slimgrad.method import OperationGraph
from slimgrad.types import Column


@dataclass(frozen=True)
class CallOperations:
    """The graph of calls in a row, and which storages and ticks of the trace its numbers stand for.

    ``outside``: for each operation, the storages from outside that it reads. ``asked_at``: number of a saved storage
    -> the tick at which backward first reads it. ``gone_at``: for each storage, the tick at which forward is done
    with it. ``held_anyway``: storages, by number, that operations outside the calls ask for in backward.
    """

    graph: OperationGraph
    storages: tuple[int, ...]
    outside: tuple[tuple[int, ...], ...]
    asked_at: dict[int, int]
    gone_at: tuple[int, ...]
    held_anyway: tuple[int, ...] = ()


@dataclass(frozen=True)
class WritesInside:
    """The ticks of a call's forward at which it writes into what it made, and whether it writes into nothing else."""

    ticks: tuple[int, ...]
    are_all: bool


class Reads:
    """Who reads each storage: in backward first and by which calls, and in forward last."""

    def __init__(self, trace: Trace) -> None:
        self.first_backward: dict[int, int] = {}
        self.last_forward: dict[int, int] = {}
        self.callers: dict[int, set[int]] = {}
        self.readers: dict[int, set[str]] = {}  # names of operations in backward
        self.by_call: dict[int, dict[int, tuple[int, int]]] = {}  # and in backward first and last
        self.op_seconds: list[float] = trace.op_seconds.tolist() or [0.0] * trace.num_ticks
        self._writes_inside: dict[int, WritesInside] = {}
        began = 0  # the first operation of the node: it is then that autograd asks for all that the node saved
        names = [trace.names[i] for i in trace.name.tolist()] or [""] * trace.num_ticks
        for index, storages in enumerate(trace.reads):
            if not (
                index and len(trace.op_node) and trace.op_node[index] == trace.op_node[index - 1]
            ):
                began = index
            for storage in storages:
                if trace.op_backward[index]:
                    self.first_backward.setdefault(storage, index + 1)
                    call = int(trace.op_call[index])
                    self.callers.setdefault(storage, set()).add(call)
                    if names[index]:
                        self.readers.setdefault(storage, set()).add(names[index])
                    spans = self.by_call.setdefault(call, {})
                    spans[storage] = spans.get(storage, (began + 1, 0))[0], index + 1
                else:
                    self.last_forward[storage] = index + 1

    def writes_inside(self, trace: Trace, call: int) -> WritesInside:
        """What the forward of a call writes into."""
        if call not in self._writes_inside:
            start, stop = trace.calls[call].forward_from, trace.calls[call].forward_to
            is_own = [
                [bool(own) for own in trace.birth[list(trace.writes[tick])] > start]
                for tick in range(start, stop)
            ]
            ticks = tuple(start + i for i, own in enumerate(is_own) if any(own))
            self._writes_inside[call] = WritesInside(ticks, all(map(all, is_own)))
        return self._writes_inside[call]

    def held_by_others(self, storage: int, calls: Sequence[int]) -> bool:
        """Whether backward reads ``storage`` in operations that belong to none of ``calls``."""
        return bool(self.callers.get(storage, set()) - set(calls))


def call_operations(
    trace: Trace, calls: Sequence[int], saved: Sequence[int], reads: Reads
) -> CallOperations:
    """The operations of ``calls``, one after the other, which save the storages ``saved``."""
    made = made_inside(trace, calls)
    number = {s: i for i, s in enumerate(made)}
    operations: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    outside: list[tuple[int, ...]] = []
    stages: list[int] = []
    for stage, index in enumerate(calls):
        call = trace.calls[index]
        for tick in range(int(call.forward_from), int(call.forward_to)):
            own = tuple(number[s] for s in trace.writes[tick] if s in number)
            if own:
                read = trace.reads[tick]
                operations.append(
                    (reads.op_seconds[tick], tuple(number[s] for s in read if s in number), own)
                )
                outside.append(tuple(s for s in read if s not in number))
                stages.append(stage)
    dropped = {s for s in saved if s in reads.first_backward}
    graph = OperationGraph(
        tuple(trace.nbytes[made].tolist()),
        tuple(s in dropped for s in made),
        tuple(operations),
        tuple(stages) if len(calls) > 1 else (),
        _uses(trace, made, dropped, reads) if len(calls) == 1 else (),  # codes: of single blocks
    )
    asked = {number[s]: reads.first_backward[s] for s in made if s in dropped}
    gone = tuple(_gone_at(trace, calls, made, reads))
    final = trace.calls[calls[-1]].outputs
    anyway = tuple(
        number[s] for s in made if s not in final and reads.held_by_others(s, calls)
    )  # what only these calls return stays with the tape
    return CallOperations(graph, tuple(made), tuple(outside), asked, gone, anyway)


def _uses(
    trace: Trace, made: Sequence[int], dropped: Container[int], reads: Reads
) -> tuple[Use | None, ...]:
    """What backward does with each storage of those that a block makes, in their order."""
    found, origin = list[Use | None](), 0
    for storage in made:
        if len(trace.name):
            maker = trace.names[trace.name[trace.birth[storage] - 1]]
            origin = origin_after(maker.partition("(")[0], origin)
        found.append(_use(trace, storage, reads, origin) if storage in dropped else None)
    return tuple(found)


def _use(trace: Trace, storage: int, reads: Reads, origin: int) -> Use | None:
    dtype = trace.dtypes[storage] if trace.dtypes else ""
    if not dtype:
        return None
    num_elements = int(trace.nbytes[storage]) // getattr(torch, dtype).itemsize
    readers = frozenset(reads.readers.get(storage, ()))
    return Use(num_elements, dtype, int(trace.row[storage]), readers, origin)


def made_inside(trace: Trace, calls: Sequence[int]) -> list[int]:
    """Storages made in the forward passes of ``calls``, in their order."""
    starts = np.array([trace.calls[index].forward_from for index in calls])
    stops = np.array([trace.calls[index].forward_to for index in calls])
    found = np.flatnonzero((trace.birth > starts.min()) & (trace.birth <= stops.max()))
    order = np.argsort(starts, kind="stable")
    latest = order[np.searchsorted(starts[order], trace.birth[found]) - 1]  # begun before it
    found = found[trace.birth[found] <= stops[latest]]
    return found[np.argsort(trace.birth[found], kind="stable")].tolist()


def saved_inside(
    trace: Trace, calls: Sequence[int], backward_from: int, reads: Reads
) -> tuple[int, ...]:
    """Storages made in calls in a row that only their own backward needs, the last one's outputs apart."""
    final, activations = set(trace.calls[calls[-1]].outputs), list(Column).index(Column.ACTIVATIONS)
    return tuple(
        s
        for s in made_inside(trace, calls)
        if trace.death[s] > backward_from
        and trace.column[s] == activations
        and s not in final
        and not reads.held_by_others(s, calls)
    )


def _gone_at(trace: Trace, calls: Sequence[int], made: Sequence[int], reads: Reads) -> list[int]:
    """The ticks after which forward has no use for storages: what a block returns is held through the next one."""
    ends = [int(trace.calls[index].forward_to) for index in calls]
    outputs = [frozenset(trace.calls[index].outputs) for index in calls]
    returned: dict[int, int] = {}  # stage -> until when what it returns is held
    found: list[int] = []
    for storage, birth in zip(made, trace.birth[list(made)].tolist(), strict=True):
        stage = bisect.bisect_left(ends, birth)
        last = ends[stage]
        if storage in outputs[stage] and stage + 1 < len(calls):
            if stage not in returned:
                returned[stage] = _caller_returns(trace, calls[stage], calls[stage + 1])
            last = max(reads.last_forward.get(storage, 0), returned[stage])
        found.append(max(last, trace.cached.get(storage, 0) - 1))
    return found


def _caller_returns(trace: Trace, first: int, second: int) -> int:
    """When whoever called block ``second`` with what block ``first`` returned lets go of it.

    That is when it returns, or, where it is one of several blocks of a module that ``first`` is outside of, the last.
    """
    names, before = trace.calls[second].path.split("."), trace.calls[first].path.split(".")
    common = 0
    while common < len(before) and names[common] == before[common]:
        common += 1
    container = ".".join(names[: common + 1])
    last = trace.calls[second].forward_to
    for call in trace.calls[second + 1 :]:
        if not call.path.startswith(f"{container}."):
            break
        last = call.forward_to
    return last


def merged(graphs: Sequence[OperationGraph]) -> OperationGraph | None:
    """One graph for all calls of a block, its bytes and mean seconds; None where they do different things."""
    if len(graphs) == 1:
        return graphs[0]
    shapes = {(g.is_saved, g.stages, tuple(o[1:] for o in g.operations)) for g in graphs}
    if len(shapes) != 1:
        return None
    operations = zip(*(g.operations for g in graphs), strict=True)
    return OperationGraph(
        tuple(map(max, zip(*(g.num_bytes for g in graphs), strict=True))),
        graphs[0].is_saved,
        tuple((sum(o[0] for o in same) / len(same), *same[0][1:]) for same in operations),
        graphs[0].stages,
        graphs[0].uses,
    )
