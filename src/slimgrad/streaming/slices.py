"""Where a parameter is cut."""

from __future__ import annotations

from typing import TypeAlias

Cut: TypeAlias = tuple[int, int]
"""``(start, end)`` of a slice of a parameter's elements in the order of memory."""


def cuts_of(num_elements: int, size: int) -> list[Cut]:
    """Slices of ``size`` elements; none of one element, whose state would look like a step count.

    >>> cuts_of(9, 4)
    [(0, 4), (4, 7), (7, 9)]
    """
    starts = list(range(0, num_elements, size))
    if len(starts) > 1 and num_elements - starts[-1] == 1:
        starts[-1] -= 1
    return list(zip(starts, [*starts[1:], num_elements], strict=True))
