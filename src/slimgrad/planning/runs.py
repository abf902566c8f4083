"""Blocks in a row: chains of blocks of which each is fed by the one before, and the segments to offer of them."""

from __future__ import annotations

from collections.abc import Iterator

from slimgrad.planning.simulate import Layout

MOST_UNITS = 48  # a longer chain is planned in units of several blocks
_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)


def chains(layout: Layout) -> list[tuple[str, ...]]:
    """Paths of blocks called one right after the other, as often as each other, each with an output of the last."""
    found: list[list[str]] = []
    for path, block in layout.blocks.items():
        if found and _follows(layout, found[-1][-1], path):
            found[-1].append(path)
        elif block.calls:
            found.append([path])
    return [tuple(chain) for chain in found if len(chain) > 1]


def _follows(layout: Layout, first: str, second: str) -> bool:
    calls, before = layout.blocks[second].calls, layout.blocks[first].calls
    trace = layout.trace
    return len(calls) == len(before) and all(
        index == last + 1 and set(trace.calls[index].inputs) & set(trace.calls[last].outputs)
        for last, index in zip(before, calls, strict=True)
    )


def unit(num_blocks: int) -> int:
    """How many blocks of a chain are planned together."""
    size = 1
    while num_blocks > MOST_UNITS * size:
        size *= 2
    return size


def segments(chain: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Runs of at least two blocks that tile the chain, in lengths from one unit to the whole."""
    size = unit(len(chain))
    lengths = {size * n for n in _LENGTHS if size * n < len(chain)} | {len(chain)}
    for length in sorted(lengths - {1}):
        for start in range(0, len(chain), length):
            segment = chain[start : start + length]
            if len(segment) > 1:
                yield segment
