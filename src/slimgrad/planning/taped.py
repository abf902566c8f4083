"""The changes to a step's lifetimes where operations are run again: what a replayed tape comes to on a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from slimgrad.method import Record
from slimgrad.planning.calls import Changes
from slimgrad.planning.restored import pending_writes
from slimgrad.types import Column

if TYPE_CHECKING:
    from slimgrad.planning.simulate import Layout

_ACTIVATIONS = list(Column).index(Column.ACTIVATIONS)
_TEMPORARIES = list(Column).index(Column.TEMPORARIES)


def tape_changes(layout: Layout, where: str | tuple[str, ...], record: Record) -> Changes:
    """What is not kept goes when forward is done with it, and comes back when it is asked for."""
    changes, block = Changes(), layout.block(where)
    for calls in block.groups:
        if layout.backward_from(calls) is not None and block.saved[calls[0]]:
            _call_changes(layout, changes, calls, record)
    return changes


def _call_changes(layout: Layout, changes: Changes, calls: tuple[int, ...], record: Record) -> None:
    trace, call = layout.trace, layout.operations(calls)
    again, kept = layout.replayed(calls, record), set(record.kept)
    storages, gone_at = np.array(call.storages, dtype=int), np.array(call.gone_at, dtype=int)
    is_dropped = np.array(call.graph.is_saved, dtype=bool)
    is_dropped[[number for number in kept if number < len(is_dropped)]] = False
    death = trace.death[storages]
    nbytes, column = trace.nbytes[storages], trace.column[storages]
    changes.spans(
        layout.drop[gone_at[is_dropped] + 1],
        layout.gone_slots(death[is_dropped]),
        -nbytes[is_dropped],
        column[is_dropped],
    )
    number, start, stop = again.again.T
    is_last = is_dropped[number] & (stop == death[number])
    changes.spans(
        layout.at[start] - 1,
        np.where(
            is_last, layout.gone_slots(stop), layout.at[np.minimum(stop, trace.num_ticks + 1)]
        ),
        nbytes[number],
        np.where(is_dropped[number], column[number], _TEMPORARIES),
    )
    for coded in record.coded:
        if coded.number < len(storages):
            start = layout.at[trace.birth[storages[coded.number]]]
            stop = layout.gone_slot(int(death[coded.number]))
            changes.span(int(start), stop, coded.num_bytes, _ACTIVATIONS)
    for tick, peak in again.bursts:
        changes.span(int(layout.at[tick]) - 1, int(layout.at[tick]), peak, _TEMPORARIES)
    if record.moved and layout.writes_behind:
        moved = [n for n in record.moved if n < len(is_dropped) and is_dropped[n]]
        pending_writes(layout, changes, calls[-1], nbytes[moved].tolist())


def held_by_tape(layout: Layout, where: str | tuple[str, ...], record: Record) -> dict[int, int]:
    """Storages that operations to be run again read from outside: storage -> the slot until which they stay."""
    found: dict[int, int] = {}
    block = layout.block(where)
    for calls in block.groups:
        if layout.backward_from(calls) is not None and block.saved[calls[0]]:
            again = layout.replayed(calls, record)
            slots = {tick: layout.gone_slot(tick) for tick in set(again.held.values())}
            for storage, tick in again.held.items():
                found[storage] = max(found.get(storage, 0), slots[tick])
    return found
