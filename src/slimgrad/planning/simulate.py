"""Replays a traced step under a plan: the live bytes at every instant, in about a millisecond a plan.

The traced step is laid out on *slots*. One slot an operation; before a block's backward a window in which its
forward may be replayed; after each completed gradient a slot for that parameter's update; at the end slots for
what the optimizer does then. Every choice is a set of changes at slots, (slot, bytes), that start or end
lifetimes; the live bytes are their running sum. So choices add up, except where two of them keep the same
border tensor alive: that is taken once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

import numpy as np

from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.optimizer import OptimizerLaw
from slimgrad.measuring.trace import Trace
from slimgrad.method import ModelRecord, OperationGraph, Record, Restore
from slimgrad.planning.calls import BlockLayout, Changes, takers, ticks_by_call
from slimgrad.planning.compiled_calls import compiled_changes, compiled_held
from slimgrad.planning.likeness import Blocks, Translation, blocks_of
from slimgrad.planning.model_changes import model_changes
from slimgrad.planning.module_replay import Stages, repeated, stages_of
from slimgrad.planning.operations import (
    CallOperations,
    Reads,
    call_operations,
    merged,
    saved_inside,
)
from slimgrad.planning.replay import Replayed, replayed
from slimgrad.planning.restored import restored_changes
from slimgrad.planning.taped import held_by_tape, tape_changes
from slimgrad.types import Column

_POSITION = {column: position for position, column in enumerate(Column)}


class Layout:
    """A trace laid out on slots, ready to be replayed under any choices."""

    def __init__(
        self, trace: Trace, law: OptimizerLaw, state_bytes: int, *, writes_behind: bool = False
    ) -> None:
        self.trace, self.law, self.state_bytes = trace, law, state_bytes
        self.writes_behind = writes_behind  # a block is over before what it moves is written
        self._by_birth = np.argsort(trace.birth, kind="stable")
        self._births = trace.birth[self._by_birth]
        self._place()
        self.blocks = self._blocks()
        self._reads = Reads(trace)
        self._runs: dict[tuple[str, ...], BlockLayout] = {}
        self._operations: dict[tuple[int, ...], CallOperations] = {}
        self._graphs: dict[str | tuple[str, ...], OperationGraph | None] = {}
        self._replays: dict[tuple[tuple[int, ...], ...], Replayed] = {}
        self._stages: dict[tuple[int, ...], Stages | None] = {}
        self._twin: tuple[Layout, Translation] | None = None  # whose blocks do the same

    def _place(self) -> None:
        trace, num = self.trace, self.trace.num_ticks
        before, after = np.zeros(num + 2, dtype=np.int64), np.zeros(num + 2, dtype=np.int64)
        self.backward_tick: dict[int, int] = {}  # the first operation of each call's backward
        self.backward_last: dict[int, int] = {}
        for tick, call in zip(
            np.flatnonzero(trace.op_backward) + 1, trace.op_call[trace.op_backward], strict=True
        ):
            self.backward_tick.setdefault(int(call), int(tick))
            self.backward_last[int(call)] = int(tick)
        self.backward_tick.pop(-1, None)
        offset: dict[int, int] = {}
        for index, tick in self.backward_tick.items():
            call = trace.calls[index]
            offset[index] = int(before[tick])
            before[tick] += call.forward_to - call.forward_from + 2
        before[1:-1] += np.asarray(trace.op_backward)  # where operations may be run again
        order: dict[str, int] = {}
        for name, (_, tick) in trace.gradients.items():
            order[name] = int(after[tick])
            after[tick] += 1
        self.at = (
            np.arange(num + 2) + np.cumsum(before) + np.concatenate(([0], np.cumsum(after)[:-1]))
        )
        self.drop = self.at - before  # a storage with death d is gone from slot drop[d] on
        self.window = {i: int(self.drop[t]) + offset[i] for i, t in self.backward_tick.items()}
        self.update_slot = {
            name: int(self.at[tick]) + 1 + order[name]
            for name, (_, tick) in trace.gradients.items()
        }
        self.update_slots = sorted(self.update_slot.values())
        # a gradient that was added to one of an earlier part is gone before the update, the trace says: after it
        self.added_to = {
            name: (trace.death == tick + 1) & (trace.nbytes == trace.nbytes[storage])
            for name, (storage, tick) in trace.gradients.items()
        }
        self.end = int(self.at[num]) + int(after[num]) + 1
        self.finish_slot = {p.name: self.end + 1 + i for i, p in enumerate(self.law.parameters)}
        self.num_slots = self.end + 2 + len(self.law.parameters)

    def _blocks(self) -> dict[str, BlockLayout]:
        trace = self.trace
        by_path: dict[str, list[int]] = {}
        for index, call in enumerate(trace.calls):
            by_path.setdefault(call.path, []).append(index)
        return {
            path: BlockLayout(
                (path,), tuple((c,) for c in calls), {c: self._saved(c) for c in calls}
            )
            for path, calls in by_path.items()
        }

    def _saved(self, index: int) -> tuple[int, ...]:
        """Storages made inside a call that its backward still needs, its outputs apart."""
        trace, call = self.trace, self.trace.calls[index]
        tick = self.backward_tick.get(index)
        if tick is None:
            return ()
        inside = self.born(call.forward_from, call.forward_to)
        is_activation = trace.column[inside] == _POSITION[Column.ACTIVATIONS]
        needed = inside[(trace.death[inside] > tick) & is_activation]
        outputs = set(call.outputs)
        return tuple(i for i in needed.tolist() if i not in outputs)

    def born(self, after: int, to: int) -> np.ndarray:
        """Storages born in ticks ``after + 1`` to ``to``, by their number."""
        first, stop = np.searchsorted(self._births, (after, to), side="right")
        return np.sort(self._by_birth[first:stop])

    def block(self, where: str | tuple[str, ...]) -> BlockLayout:
        """The block of a path, or the blocks in a row of several."""
        if isinstance(where, str):
            return self.blocks[where]
        if where not in self._runs:
            self._runs[where] = self._run(where)
        return self._runs[where]

    def _run(self, paths: tuple[str, ...]) -> BlockLayout:
        if self._twin is not None:
            twin, translation = self._twin
            return translation.block(twin.block(paths))
        groups = tuple(zip(*(self.blocks[path].calls for path in paths), strict=True))
        return BlockLayout(paths, groups, {g[0]: self._saved_by_run(g) for g in groups})

    def _saved_by_run(self, calls: tuple[int, ...]) -> tuple[int, ...]:
        tick = self.backward_from(calls)
        return () if tick is None else saved_inside(self.trace, calls, tick, self._reads)

    def seconds(self, calls: tuple[int, ...], *, backward: bool) -> float:
        """Seconds of the operations of these calls, forward or backward."""
        if not calls or not self.trace.op_seconds.size:
            return 0.0
        ticks = np.sort(np.concatenate([self._ticks[backward][call] for call in calls]))
        return float(self.trace.op_seconds[ticks].sum())

    @cached_property
    def _ticks(self) -> list[list[np.ndarray]]:
        return [ticks_by_call(self.trace, backward=b) for b in (False, True)]

    def backward_from(self, calls: tuple[int, ...]) -> int | None:
        """The tick at which the backward pass of calls in a row begins; None if it never does."""
        return min((self.backward_tick[c] for c in calls if c in self.backward_tick), default=None)

    @cached_property
    def what_blocks_do(self) -> Blocks:
        """Its digest is equal for layouts whose blocks do the same."""
        return blocks_of(self.trace, self._reads)

    def learns_from(self, other: Layout) -> None:
        """Take over what ``other``, whose blocks do the same, knows of them."""
        self._twin = other, Translation(other.what_blocks_do, self.what_blocks_do)

    def operations(self, calls: tuple[int, ...]) -> CallOperations:
        """The operations of a call, or of calls in a row."""
        if calls not in self._operations and self._twin is not None:
            twin, translation = self._twin
            self._operations[calls] = translation.operations(twin.operations(calls))
        elif calls not in self._operations:
            paths = tuple(self.trace.calls[c].path for c in calls)
            saved = self.block(paths[0] if len(paths) == 1 else paths).saved[calls[0]]
            self._operations[calls] = call_operations(self.trace, calls, saved, self._reads)
        return self._operations[calls]

    def graph(self, where: str | tuple[str, ...]) -> OperationGraph | None:
        """What the calls of a block do; None if they differ, or nothing is known of their operations."""
        if not self.trace.reads:
            return None
        if where not in self._graphs:
            block = self.block(where)
            graphs = [self.operations(g).graph for g in block.groups if block.saved[g[0]]]
            self._graphs[where] = merged(graphs)
        return self._graphs[where]

    def held_anyway(self, where: str | tuple[str, ...]) -> tuple[int, ...]:
        """Storages made in blocks in a row, by number, that the rest of the step asks for in backward."""
        block = self.block(where)
        if len(block.paths) == 1 or not self.trace.reads:
            return ()
        return tuple(sorted({n for g in block.groups for n in self.operations(g).held_anyway}))

    def stages(self, calls: tuple[int, ...]) -> Stages | None:
        """Calls in a row as modules that can be run again as they are; None where they cannot."""
        if calls not in self._stages:
            operations = self.operations(calls)
            self._stages[calls] = stages_of(self.trace, calls, operations, self._reads)
        return self._stages[calls]

    def are_repeatable(self, where: str | tuple[str, ...]) -> bool:
        """Whether blocks in a row can be run again as modules."""
        block = self.block(where)
        if len(block.paths) == 1 or not self.trace.reads:
            return False
        return all(self.stages(group) is not None for group in block.groups)

    def replayed(self, calls: tuple[int, ...], record: Record) -> Replayed:
        """What calls in a row make again or read back in backward, run as ``record`` says."""
        source = self if self._twin is None else self._twin[0]
        stages = source.stages(calls) if record.by_modules else None
        coded = tuple(c.number for c in record.coded)
        key = calls, record.kept, record.schedule, record.moved, coded, (int(stages is not None),)
        if key not in self._replays and self._twin is not None:
            twin, translation = self._twin
            self._replays[key] = translation.replayed(twin.replayed(calls, record))
        elif key not in self._replays:
            operations = self.operations(calls)
            self._replays[key] = (
                repeated(stages, operations, record.schedule)
                if stages is not None
                else replayed(
                    self.trace, operations, record.kept, record.schedule, record.moved, coded
                )
            )
        return self._replays[key]

    # -- the step as it was traced -----------------------------------------------------------------

    @cached_property
    def base(self) -> Changes:
        """The traced forward and backward passes, gradients kept to the end; no optimizer."""
        trace = self.trace
        stop = np.where(
            trace.death > trace.num_ticks,
            self.num_slots,
            self.drop[np.minimum(trace.death, trace.num_ticks + 1)],
        )
        changes = Changes()
        changes.spans(self.at[trace.birth], stop, trace.nbytes, trace.column)
        return changes

    # -- choices -----------------------------------------------------------------------------------

    def block_changes(
        self,
        where: str | tuple[str, ...],
        record: Record,
        offloaded: Collection[int] | None = None,
    ) -> Changes:
        """What changes when block ``where`` behaves as ``record`` says, held inputs apart.

        ``offloaded`` are the calls of all blocks that are copied back, each while the one after it is in backward
        (None: as if every call were).
        """
        if record.is_compiled:
            return compiled_changes(self, self.block(where).path, record)
        if record.restore is Restore.OPERATIONS:
            return tape_changes(self, where, record)
        if record.restore is Restore.NONE and record.held_bytes >= record.saved_bytes:
            return Changes()
        return restored_changes(self, where, record, offloaded)

    @cached_property
    def windows(self) -> list[int]:
        """The slots at which windows before a backward begin, in their order."""
        return sorted(self.window.values())

    @cached_property
    def takers(self) -> dict[int, list[int]]:
        """The calls that take each storage."""
        return takers(self.trace.calls)

    @cached_property
    def forward_ends(self) -> list[int]:
        """The ticks at which calls' forward passes end, in their order."""
        return sorted(call.forward_to for call in self.trace.calls)

    def held(self, where: str | tuple[str, ...], record: Record) -> dict[int, int]:
        """Storages that a block behaving as ``record`` says keeps alive longer: storage -> until which slot."""
        if record.is_compiled:
            return compiled_held(self, self.block(where).path, record)
        if not record.holds_inputs:
            return {}
        if record.restore is not Restore.OPERATIONS:
            return self.held_inputs(self.block(where).path)
        found = held_by_tape(self, where, record)
        return {s: stop for s, stop in found.items() if self._freed_slot[s] < stop}

    def held_inputs(self, path: str) -> dict[int, int]:
        """Border storages that recomputing ``path`` keeps alive longer: storage -> the slot it is held to.

        What recomputation starts from is let go when the last saved tensor of the call is, not when it has run.
        """
        held: dict[int, int] = {}
        for index in self.blocks[path].calls:
            if index in self.window:
                stop = int(self.at[self.backward_last[index]]) + 1
                for storage in self.trace.calls[index].inputs:
                    if self._freed_slot[storage] < stop:
                        held[storage] = max(held.get(storage, 0), stop)
        return held

    def gone_slots(self, deaths: np.ndarray) -> np.ndarray:
        """The slots from which storages are gone that the trace says are gone at ticks ``deaths``."""
        return self.drop[np.minimum(deaths, self.trace.num_ticks + 1)]

    def gone_slot(self, death: int) -> int:
        """``gone_slots`` for one."""
        return int(self.drop[min(death, self.trace.num_ticks + 1)])

    @cached_property
    def _freed_slot(self) -> list[int]:
        return self.gone_slots(self.trace.death).tolist()

    def hold_changes(self, held: Mapping[int, int]) -> Changes:
        """The changes of keeping border storages alive to the given slots."""
        changes, storages = Changes(), list(held)
        changes.spans(
            self.gone_slots(self.trace.death[storages]),
            np.array(list(held.values()), dtype=np.int64),
            self.trace.nbytes[storages],
            self.trace.column[storages],
        )
        return changes

    def model_changes(self, record: ModelRecord) -> Changes:
        """The optimizer's part: its state, its updates, and how long gradients live."""
        return model_changes(self, record)

    # -- answers -----------------------------------------------------------------------------------

    def live(self, changes: Changes) -> np.ndarray:
        """The running sum of changes alone (without ``base``), one entry a slot."""
        slot, nbytes, _ = changes.rows.T
        return np.cumsum(np.bincount(slot, nbytes, self.num_slots + 1))[: self.num_slots]

    @cached_property
    def base_live(self) -> np.ndarray:
        """Live bytes of the traced passes at every slot."""
        return self.live(self.base)

    def where(self, slot: int) -> str:
        """What the step does at a slot: ``forward of body.3``, ``backward of body.3``, ``the optimizer``."""
        if slot >= self.end and self.law.parameters:
            return "the optimizer"
        tick = int(np.searchsorted(self.at, slot))
        index = min(max(tick - 1, 0), len(self.trace.op_call) - 1)
        call, is_backward = int(self.trace.op_call[index]), bool(self.trace.op_backward[index])
        place = self.trace.calls[call].path if call >= 0 else "what lies outside blocks"
        return f"{'backward' if is_backward else 'forward'} of {place}"

    def timeline(self, changes: Changes) -> MemoryTimeline:
        """Live bytes by column under ``changes``, at every slot that is not an empty window."""
        everything = Changes()
        everything.extend(self.base)
        everything.extend(changes)
        slot, nbytes, column = everything.rows.T
        columns = {}
        for name, position in _POSITION.items():
            mine = column == position
            total = np.bincount(slot[mine], nbytes[mine], self.num_slots + 1)
            columns[name] = np.cumsum(total)[: self.num_slots].astype(np.int64)
        marks = [(int(self.at[self.trace.backward_from]), "backward begins")]
        if self.law.parameters:
            marks.append((self.end, "optimizer"))
        return MemoryTimeline(columns, tuple(marks))
