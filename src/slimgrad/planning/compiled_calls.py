"""What changes in a replayed step when calls of a block are compiled: nothing of the traced call's inside is left.

While a compiled call's forward or backward runs, the replay shows its measured peak all the time; between them
what it saves; afterwards everything is as the traced call left it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from slimgrad.method import CompiledCost, Record, Restore
from slimgrad.planning.calls import Changes, call_bytes
from slimgrad.types import Column

if TYPE_CHECKING:
    from slimgrad.planning.simulate import Layout

_POSITION = {column: position for position, column in enumerate(Column)}
_ACTIVATION, _TEMPORARY = _POSITION[Column.ACTIVATIONS], _POSITION[Column.TEMPORARIES]


def is_measured(layout: Layout, path: str, cost: CompiledCost) -> bool:
    """Whether the block's calls in this trace are like the one that was compiled (parts of a batch are not)."""
    block, trace = layout.blocks[path], layout.trace
    made = [call_bytes(trace, block.saved[call]) for call in block.calls]
    room = max(4096, cost.plain_saved_bytes // 100)  # storages that inputs and outputs share
    return all(abs(nbytes - cost.plain_saved_bytes) <= room for nbytes in made)


def compiled_changes(layout: Layout, path: str, record: Record) -> Changes:
    """The changes of running every call of block ``path`` compiled, held inputs apart."""
    cost, changes = record.compiled, Changes()
    assert cost is not None
    for index in layout.blocks[path].calls:
        if index in layout.window:
            _forward_changes(changes, layout, index, cost)
            _backward_changes(changes, layout, index, record, cost)
    return changes


def _forward_changes(changes: Changes, layout: Layout, index: int, cost: CompiledCost) -> None:
    trace, call = layout.trace, layout.trace.calls[index]
    begin, end = int(layout.at[call.forward_from + 1]), int(layout.drop[call.forward_to + 1])
    for storage in _born(layout, call.forward_from, call.forward_to):
        start, stop = _life(layout, storage)
        if storage in call.outputs:
            stop = min(stop, end)
        changes.span(start, stop, -int(trace.nbytes[storage]), int(trace.column[storage]))
    _undo_deaths(changes, layout, _born(layout, -1, call.forward_from), begin, end)
    changes.span(begin, end, cost.forward_peak_bytes, _TEMPORARY)


def _backward_changes(
    changes: Changes, layout: Layout, index: int, record: Record, cost: CompiledCost
) -> None:
    trace, call = layout.trace, layout.trace.calls[index]
    first, last = layout.backward_tick[index], layout.backward_last[index]
    begin, end = int(layout.at[first]), int(layout.drop[last + 1])
    made_in_forward = int(layout.drop[call.forward_to + 1])
    if record.restore is Restore.REPLAY:
        again = layout.window[index]
        changes.span(again, begin, cost.forward_peak_bytes, _TEMPORARY)
        changes.span(begin, end, cost.saved_bytes, _ACTIVATION)
    else:
        changes.span(made_in_forward, end, cost.saved_bytes, _ACTIVATION)
    changes.span(begin, end, cost.backward_peak_bytes, _TEMPORARY)
    mine = {int(tick) + 1 for tick in np.flatnonzero((trace.op_call == index) & trace.op_backward)}
    gone = {} if record.gradients_stay else _leaving(layout)
    for storage in _born(layout, first - 1, last):
        if int(trace.birth[storage]) not in mine:
            continue
        start, stop = _life(layout, storage)
        nbytes, column = int(trace.nbytes[storage]), int(trace.column[storage])
        changes.span(start, min(stop, end), -nbytes, column)
        if storage in gone:  # its update or its file has to wait
            changes.span(gone[storage], min(stop, end), nbytes, column)
    removed = set(_born(layout, call.forward_from, call.forward_to)) - set(call.outputs)
    held = (call.inputs if record.holds_inputs else ()) + (
        call.outputs if cost.holds_outputs else ()
    )
    others = set(_born(layout, -1, first - 1)) - removed - set(held)
    _undo_deaths(changes, layout, others, begin, end)


def _born(layout: Layout, after: int, to: int) -> list[int]:
    birth = layout.trace.birth
    return [int(s) for s in np.flatnonzero((birth > after) & (birth <= to))]


def _life(layout: Layout, storage: int) -> tuple[int, int]:
    trace = layout.trace
    death = int(trace.death[storage])
    stop = layout.num_slots if death > trace.num_ticks else int(layout.drop[death])
    return int(layout.at[int(trace.birth[storage])]), stop


def _leaving(layout: Layout) -> dict[int, int]:
    """For each gradient's storage, the slot from which an update or a file has taken it."""
    return {
        storage: layout.update_slot[name] + 1
        for name, (storage, _) in layout.trace.gradients.items()
    }


def _undo_deaths(
    changes: Changes, layout: Layout, storages: Collection[int], begin: int, end: int
) -> None:
    """Of ``storages``, what is let go in slots ``begin`` to ``end`` stays to their end: the peak counts it in."""
    trace = layout.trace
    for storage in storages:
        if trace.death[storage] <= trace.num_ticks:
            gone = int(layout.drop[int(trace.death[storage])])
            if begin < gone < end:
                changes.span(gone, end, int(trace.nbytes[storage]), int(trace.column[storage]))


def compiled_held(layout: Layout, path: str, record: Record) -> dict[int, int]:
    """Storages at the border that the compiled block keeps until its backward is over, and to which slot."""
    cost = record.compiled
    held = layout.held_inputs(path) if record.holds_inputs else {}
    if cost is None or not cost.holds_outputs:
        return held
    for index in layout.blocks[path].calls:
        if index in layout.window:
            stop = int(layout.at[layout.backward_last[index]]) + 1
            for storage in layout.trace.calls[index].outputs:
                if _life(layout, storage)[1] < stop:
                    held[storage] = max(held.get(storage, 0), stop)
    return held
