"""The changes to a step's lifetimes where all that a block saved comes back at once: run again as it is, or copied back."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from slimgrad.method import Record, Restore
from slimgrad.planning.calls import Changes
from slimgrad.storage import MAX_PENDING_BYTES
from slimgrad.types import Column

if TYPE_CHECKING:
    from slimgrad.planning.simulate import Layout

_ACTIVATIONS = list(Column).index(Column.ACTIVATIONS)
_TEMPORARIES = list(Column).index(Column.TEMPORARIES)


def restored_changes(
    layout: Layout,
    where: str | tuple[str, ...],
    record: Record,
    offloaded: Collection[int] | None,
) -> Changes:
    """What is not held goes after the block's forward, and comes back right before its backward.

    ``offloaded`` are the calls of all blocks that are copied back, each while the one after it is in backward
    (None: as if every call were).
    """
    changes, trace = Changes(), layout.trace
    share = record.held_bytes / record.saved_bytes if record.saved_bytes else 1.0
    is_replay = record.restore is Restore.REPLAY
    for index, saved in layout.block(where).saved.items():
        if index not in layout.window:
            continue
        call = trace.calls[index]
        gone = int(layout.drop[call.forward_to + 1])
        back = _restored_at(layout, index, record.restore, offloaded)
        for storage in saved:
            nbytes, column = int(trace.nbytes[storage]), int(trace.column[storage])
            free = max(gone, int(layout.drop[trace.cached.get(storage, 0)]))
            again = int(trace.birth[storage]) - call.forward_from if is_replay else 0
            changes.span(free, back + again, -nbytes * (1 - share), column)
        if is_replay:
            _replayed_outputs(layout, changes, index)
            _replayed_temporaries(layout, changes, index, saved)
        elif record.restore is Restore.COPY:
            sizes = [int(trace.nbytes[s]) for s in saved]
            pending_writes(layout, changes, index, sizes, 1 - share)
    return changes


def pending_writes(
    layout: Layout, changes: Changes, index: int, sizes: Sequence[int], share: float = 1.0
) -> None:
    """What a block's forward leaves to be written is live until it is, during the next block's at most."""
    pending = min(sum(sizes) * share, max([MAX_PENDING_BYTES, *sizes]))
    start = int(layout.drop[layout.trace.calls[index].forward_to + 1])
    ends = layout.forward_ends
    after = bisect.bisect_right(ends, layout.trace.calls[index].forward_to)
    end = ends[after] if after < len(ends) else layout.trace.backward_from
    changes.span(start, int(layout.drop[end + 1]), pending, _ACTIVATIONS)


def _restored_at(
    layout: Layout, index: int, restore: Restore, offloaded: Collection[int] | None
) -> int:
    here = layout.window[index]
    if restore is not Restore.COPY:
        return here
    if offloaded is None:
        before = bisect.bisect_left(layout.windows, here)
        return layout.windows[before - 1] if before else here
    return max((w for i in offloaded if (w := layout.window[i]) < here), default=here)


def _replayed_outputs(layout: Layout, changes: Changes, index: int) -> None:
    """Outputs that only the block's own backward still needs are gone until they are made again."""
    trace, call, start = layout.trace, layout.trace.calls[index], layout.window[index]
    first, last = layout.backward_tick[index], layout.backward_last[index]
    for storage in call.outputs:
        others = layout.takers.get(storage, ())
        free = all(layout.backward_last.get(i, 0) < first for i in others)
        if free and first < trace.death[storage] <= last + 1:
            again = start + int(trace.birth[storage]) - call.forward_from
            nbytes, column = int(trace.nbytes[storage]), int(trace.column[storage])
            changes.span(start, again, -nbytes, column)


def _replayed_temporaries(
    layout: Layout, changes: Changes, index: int, saved: tuple[int, ...]
) -> None:
    trace, call = layout.trace, layout.trace.calls[index]
    if not saved:
        return
    last = max(int(trace.birth[s]) for s in saved)  # where recomputation stops
    start = layout.window[index] - call.forward_from
    inside = layout.born(call.forward_from, last)
    for storage in inside[trace.death[inside] <= call.forward_to + 1]:
        birth, death = int(trace.birth[storage]), min(int(trace.death[storage]), last + 1)
        changes.span(start + birth, start + death, int(trace.nbytes[storage]), _TEMPORARIES)
