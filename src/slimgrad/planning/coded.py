"""Ways to keep what a block saves as codes: one method or two, and then a schedule that says what is kept at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from slimgrad.method import Block, Method, Offer, Record, Scope
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute

_MOST, _ACCURATE = 12, 4  # ways to code a block, before its schedules

_T = TypeVar("_T")


@dataclass(frozen=True)
class Way:
    """Methods in their order, what each says of itself, and what they make of a block together."""

    methods: tuple[Method, ...]
    notes: tuple[str, ...]
    record: Record


def coded_ways(
    path: str,
    record: Record,
    stores: Sequence[type[CodedStore]],
    error: float = math.inf,
    *,
    may_run_again: bool = True,
) -> list[Way]:
    """What the methods ``stores`` make of a block, alone and in twos, under each schedule worth it.

    Those of the fewest bytes are taken, of which a schedule may keep a part as codes, and those of the fewest that keep
    to ``error`` (of the whole gradient) with all that they code. Unless it ``may_run_again``, nothing of the block is.
    """
    coded = undominated(_coded(path, record, stores), lambda way: _price(way.record))
    leanest = sorted(coded, key=lambda way: _kept_bytes(way.record))
    accurate = [way for way in leanest[_MOST:] if way.record.squared_error <= error**2]
    found: list[Way] = []
    for way in (*leanest[:_MOST], *accurate[:_ACCURATE]):
        found += [w for w in _then(path, way, [SelectiveRecompute]) if w.record.coded]
    if may_run_again or record.graph is None:
        return found
    whole = SelectiveRecompute(record.graph.saved)
    return [way for way in found if way.methods[-1] == whole]


def undominated(things: Iterable[_T], price: Callable[[_T], tuple[float, ...]]) -> list[_T]:
    """Those than which none is as cheap in every way, and cheaper in one."""
    priced = sorted(
        ((price(thing), i, thing) for i, thing in enumerate(things)), key=lambda p: p[:2]
    )
    kept: list[tuple[tuple[float, ...], _T]] = []
    for cost, _, thing in priced:
        if not any(all(a <= b for a, b in zip(other, cost, strict=True)) for other, _ in kept):
            kept.append((cost, thing))
    return [thing for _, thing in kept]


def _coded(path: str, record: Record, stores: Sequence[type[CodedStore]]) -> Iterator[Way]:
    for first in _then(path, Way((), (), record), stores):
        yield first
        yield from _then(
            path, first, [cls for cls in stores if not isinstance(first.methods[0], cls)]
        )


def _then(
    path: str, way: Way, classes: Sequence[type[CodedStore] | type[SelectiveRecompute]]
) -> Iterator[Way]:
    asked = Block(path, Scope.BLOCK, way.record)
    for cls in classes:
        for method in cls.grades(asked):
            offer = method.offer(asked)
            if isinstance(offer, Offer) and isinstance(offer.record, Record):
                yield Way((*way.methods, method), (*way.notes, offer.note), offer.record)


def _price(record: Record) -> tuple[float, ...]:
    seconds = sum(c.encode_s + c.decode_s for c in record.coded)
    return _kept_bytes(record), seconds, record.squared_error


def _kept_bytes(record: Record) -> int:
    graph = record.graph
    assert graph is not None
    return sum(n for n, saved in zip(graph.num_bytes, graph.is_saved, strict=True) if saved)
