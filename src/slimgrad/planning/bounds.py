"""A lower bound of a step's peak from its layout alone, before anything is offered for its blocks.

Options for blocks take away what blocks make and save, and that only once the block's forward is over. All else
stays as it was traced, whatever is chosen.
"""

from __future__ import annotations

import numpy as np

from slimgrad.planning.simulate import Layout


def least_live(layout: Layout, *, may_compile: bool) -> np.ndarray:
    """Live bytes that no choice for blocks takes away, one entry a slot.

    Of what a block's forward makes only its stay in that forward is counted; nothing of what a block makes where it
    ``may_compile``.
    """
    trace = layout.trace
    start, stop = layout.at[trace.birth], layout.gone_slots(trace.death)
    stop = np.where(trace.death > trace.num_ticks, layout.num_slots, stop)
    for index, call in enumerate(trace.calls):
        inside = layout.born(call.forward_from, call.forward_to)
        ends = start[inside] if may_compile else int(layout.drop[call.forward_to + 1])
        stop[inside] = np.minimum(stop[inside], ends)
        if may_compile and index in layout.backward_tick:
            first, last = layout.backward_tick[index], layout.backward_last[index]
            inside = layout.born(first - 1, last)
            stop[inside] = start[inside]
    total = np.bincount(start, trace.nbytes, layout.num_slots + 1)
    total -= np.bincount(stop, trace.nbytes, layout.num_slots + 1)
    return np.cumsum(total)[: layout.num_slots]
