"""The changes to a step's lifetimes where operations are run again: what a replayed tape comes to on a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimgrad.method import Record
from slimgrad.planning.calls import Changes
from slimgrad.types import Column

if TYPE_CHECKING:
    from slimgrad.planning.simulate import Layout

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
    again = layout.replayed(calls, record.kept, record.schedule)
    dropped: set[int] = set()
    for number, is_saved in enumerate(call.graph.is_saved):
        if is_saved and number not in record.kept:
            storage = call.storages[number]
            dropped.add(number)
            changes.span(
                int(layout.drop[call.gone_at[number] + 1]),
                layout.gone_slot(int(trace.death[storage])),
                -int(trace.nbytes[storage]),
                int(trace.column[storage]),
            )
    for number, start, stop in again.again:
        storage = call.storages[number]
        is_last = number in dropped and stop == int(trace.death[storage])
        there = layout.gone_slot(stop) if is_last else int(layout.at[stop])
        column = int(trace.column[storage]) if number in dropped else _TEMPORARIES
        changes.span(int(layout.at[start]) - 1, there, int(trace.nbytes[storage]), column)
    for tick, nbytes in again.bursts:
        changes.span(int(layout.at[tick]) - 1, int(layout.at[tick]), nbytes, _TEMPORARIES)


def held_by_tape(layout: Layout, where: str | tuple[str, ...], record: Record) -> dict[int, int]:
    """Storages that operations to be run again read from outside: storage -> the slot until which they stay."""
    found: dict[int, int] = {}
    block = layout.block(where)
    for calls in block.groups:
        if layout.backward_from(calls) is not None and block.saved[calls[0]]:
            again = layout.replayed(calls, record.kept, record.schedule)
            for storage, tick in again.held.items():
                found[storage] = max(found.get(storage, 0), layout.gone_slot(tick))
    return found
