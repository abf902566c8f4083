"""The optimizer's part of a replayed step: its state, its updates, and how long gradients live."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from slimgrad.method import ModelRecord, Update
from slimgrad.planning.calls import Changes
from slimgrad.types import Column

if TYPE_CHECKING:
    from slimgrad.planning.simulate import Layout

_POSITION = {column: position for position, column in enumerate(Column)}
_SCALARS = 1024  # bytes: loss values and norms that a step keeps beside what was traced


def model_changes(layout: Layout, record: ModelRecord) -> Changes:
    """The optimizer's part: its state, its updates, and how long gradients live."""
    changes = Changes()
    changes.span(0, layout.num_slots, _SCALARS, _POSITION[Column.TEMPORARIES])
    state, temporary = _POSITION[Column.OPTIMIZER_STATE], _POSITION[Column.TEMPORARIES]
    gradient = _POSITION[Column.GRADIENTS]
    if not layout.law.parameters:
        return changes
    kept = 0 if record.state_in_files else layout.state_bytes
    changes.span(0, layout.num_slots, kept, state)
    in_backward = record.gradients_in_files or record.update is Update.DURING
    # kept from step to step where backward uses them, else made for the updates after it
    buffers_from = 0 if in_backward else layout.end
    changes.span(buffers_from, layout.num_slots, record.buffer_bytes, state)
    if not (record.state_in_files or in_backward):
        changes.span(layout.end, layout.end + 1, layout.law.step_transient_bytes, temporary)
        return changes
    for parameter in layout.law.parameters:
        if parameter.name not in layout.trace.gradients:
            continue
        storage, _ = layout.trace.gradients[parameter.name]
        nbytes = int(layout.trace.nbytes[storage])
        during, last = layout.update_slot[parameter.name], layout.finish_slot[parameter.name]
        update_at = during if record.update is Update.DURING else last
        share = min(1.0, record.slice_bytes / parameter.nbytes) if record.slice_bytes else 1.0
        moved = 0 if record.slice_bytes or not record.state_in_files else parameter.state_bytes
        changes.span(update_at, update_at + 1, parameter.transient_bytes * share + moved, temporary)
        if record.update is Update.DURING:
            gone = during + 1
            if layout.added_to[parameter.name].any():
                tick = layout.trace.gradients[parameter.name][1]
                changes.span(during, int(layout.drop[tick + 1]), -nbytes, temporary)
        else:
            gone = _written_slot(layout, during) if record.gradients_in_files else last + 1
        changes.span(gone, layout.num_slots, -nbytes, gradient)
        if record.gradients_in_files:
            changes.span(last, last + 1, nbytes * share, gradient)
    return changes


def _written_slot(layout: Layout, completed: int) -> int:
    """Where a gradient that is being written is gone at the latest: when the next one is complete."""
    after = bisect.bisect_right(layout.update_slots, completed)
    return (layout.update_slots[after] if after < len(layout.update_slots) else layout.end) + 1
