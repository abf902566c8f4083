"""Of what a block saves for backward keeps some, moves some out of memory, and runs again only what makes the rest.

Formula: a block's operations make the storages s; backward needs the set S. Keep K; write M, a part of S, to where
    offloaded tensors go and read it back; what of S is in neither is made again from K, M and the block's inputs by the
    operations between. For a bound b on the bytes of K, with write and read in bytes a second:
    minimise sum_o seconds(o) r(o) + sum_s (bytes(s) / write + bytes(s) / read) m(s)  subject to
    sum_s bytes(s) k(s) <= b,  r(o) >= 1 - k(s) - m(s) for s in S and each o that writes s,
    r(w) >= r(o) - k(s) - m(s) for each s that o reads and w that writes s;  m(s) = 0 outside S and below 64 KiB.
Memory: activations: K instead of S, and during the block's backward what is made again, each from when it is asked for
    to its last use; what was moved likewise, but that the next one is already being read. Time: the operations run
    again, and no other (r(o) = 1); each moved byte written and read once a step, less what overlaps.
Exactness: bitwise: the same operations on the same values, and the same bytes read back; operations that draw random
    numbers start from the state of their first run; batch norm's statistics are not touched. A forward pass that takes
    another path on the second run cannot differ, since it is not run a second time.
Limits: refused where the block saves nothing, or its calls differ from one another. What operations on tensor
    subclasses, and kernels that are no PyTorch operations, made stays in memory. Each operation of the block's forward
    pass costs some microseconds more. On the CPU a block waits, before its forward is over, until what it moves is
    written to a file.
References: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, section 5: recompute
    what takes much memory and little time. *departs:* what that is, is found by an integer programme over the measured
    bytes and seconds of the block's operations, not named by hand; whole operations are run again, below autograd.
    Moving single tensors is not in the paper; vDNN (Rhu et al., arXiv 1602.08124, section III) moves feature maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from slimgrad.integer_programs import at_least, at_most, solve
from slimgrad.method import (
    Block,
    CodedStorage,
    Offer,
    OperationGraph,
    Paper,
    Record,
    Refusal,
    Restore,
    Scope,
    Undo,
)
from slimgrad.methods.activations.moving import Moving
from slimgrad.methods.activations.operation_tape import Tape
from slimgrad.methods.activations.values import NOTE_S, RUN_S
from slimgrad.methods.activations.wrapping import wrap_forward
from slimgrad.storage import store_of
from slimgrad.storage.saved import returned_tensors
from slimgrad.storage.stored import HAND_OVER_S, SMALL_BYTES
from slimgrad.types import Column, Exactness, format_bytes

_NEVER_S = 1e3  # of an operation that reads what only backward may read
_GRADES = (0.0, 0.03, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)


class Transfers(NamedTuple):
    """How fast storages are moved out of memory and back; those below ``min_bytes`` are not."""

    write_bytes_s: float
    read_bytes_s: float
    min_bytes: int = SMALL_BYTES

    def seconds(self, num_bytes: int) -> float:
        """What moving one storage, out and back, takes."""
        return num_bytes / self.write_bytes_s + num_bytes / self.read_bytes_s + 2 * HAND_OVER_S


class Point(NamedTuple):
    """Storages, by number: those that stay and those that are moved; the others are made again."""

    keep: tuple[int, ...]
    move: tuple[int, ...] = ()


@functools.lru_cache(maxsize=256)
def pareto_front(graph: OperationGraph, transfers: Transfers | None = None) -> tuple[Point, ...]:
    """What to keep and what to move, each the way with the least seconds for the bytes kept, leanest first.

    Without ``transfers`` nothing is moved.
    """
    saved = graph.saved
    total = sum(graph.num_bytes[s] for s in saved)
    movable = _movable(graph, saved, transfers)
    found: dict[Point, tuple[float, float]] = {}
    for share in _GRADES:
        point = _cheapest(graph, saved, movable, share * total)
        if point is not None:
            again = operations_again(graph, point)
            seconds = sum(graph.operations[o][0] + RUN_S for o in again)
            seconds += sum(movable[s] for s in point.move)
            found[point] = (float(sum(graph.num_bytes[s] for s in point.keep)), seconds)
    front: list[Point] = []
    least = float("inf")
    for point, (_, seconds) in sorted(found.items(), key=lambda item: item[1]):
        if seconds < least and len(point.keep) < len(saved):
            front.append(point)
            least = seconds
    return tuple(front)


def operations_again(graph: OperationGraph, point: Point) -> list[int]:
    """The operations that make what is neither kept nor moved."""
    there = frozenset((*point.keep, *point.move))
    return graph.recipe(graph.saved, there)


def _movable(
    graph: OperationGraph, saved: Sequence[int], transfers: Transfers | None
) -> dict[int, float]:
    """Seconds to move each storage that is worth it: large, and slower to make from nothing."""
    if transfers is None:
        return {}
    found: dict[int, float] = {}
    for storage in saved:
        seconds = transfers.seconds(graph.num_bytes[storage])
        made = graph.recipe([storage], ())
        if graph.num_bytes[storage] >= transfers.min_bytes and seconds < sum(
            graph.operations[o][0] + RUN_S for o in made
        ):
            found[storage] = seconds
    return found


def _cheapest(
    graph: OperationGraph, saved: Sequence[int], movable: Mapping[int, float], most: float
) -> Point | None:
    """The integer programme of the card, for one bound on the bytes kept."""
    num_storages, num_ops = len(graph.num_bytes), len(graph.operations)
    moved = {s: num_storages + num_ops + i for i, s in enumerate(movable)}
    rows = list(_rows(graph, saved, moved))
    entries = [(i, column, v) for i, (row, _) in enumerate(rows) for column, v in row.items()]
    index = np.array([e[:2] for e in entries]).T
    num = num_storages + num_ops + len(moved)
    at_least_rows = csr_array(([e[2] for e in entries], index), shape=(len(rows), num))
    sizes = np.array([*graph.num_bytes, *[0] * (num - num_storages)], dtype=float)
    seconds = np.array([o[0] + RUN_S for o in graph.operations])
    scale = max(float(sizes.sum()), 1.0)
    moving = np.array(list(movable.values()))
    spent = np.concatenate((seconds, moving)) / max(seconds.sum(), 1e-12)
    answer = solve(
        np.concatenate((1e-4 * sizes[:num_storages] / scale, spent)),
        [
            at_least(at_least_rows, np.array([b for _, b in rows])),
            at_most(sizes[None, :] / scale, np.array([most / scale])),
        ],
        is_integer=np.concatenate((np.ones(num_storages), np.zeros(num_ops), np.ones(len(moved)))),
        upper=np.ones(num),
        gap=1e-2,
        limit_s=2.0,
    )
    if answer is None:
        return None
    chosen = np.round(answer) > 0
    keep = tuple(int(s) for s in np.flatnonzero(chosen[:num_storages]))
    return Point(keep, tuple(s for s, i in moved.items() if chosen[i] and not chosen[s]))


def _rows(
    graph: OperationGraph, saved: Sequence[int], moved: Mapping[int, int]
) -> Iterator[tuple[dict[int, float], float]]:
    """Sum of coefficient * x at least bound; ``moved``: storage -> its unknown, after kept(s) and r(o)."""
    num = len(graph.num_bytes)

    def there(storage: int) -> dict[int, float]:
        return {storage: 1.0} | ({moved[storage]: 1.0} if storage in moved else {})

    for storage in saved:
        for op in graph.writers[storage]:
            yield {num + op: 1.0} | there(storage), 1.0
    for op, (_, reads, writes) in enumerate(graph.operations):
        for storage in set(reads) - set(writes):
            for writer in graph.writers[storage]:
                if writer < op:
                    yield {num + writer: 1.0, num + op: -1.0} | there(storage), 0.0


def _readable(graph: OperationGraph, record: Record) -> OperationGraph:
    """The graph in which operations are too dear that read codes which are near to nothing, or make what is not smooth."""
    codes = {c.number for c in record.coded if not c.is_near}
    made = {c.number for c in record.coded if not c.is_smooth}
    if not codes | made:
        return graph
    operations = [
        (seconds + _NEVER_S if codes & {*reads} or made & {*writes} else seconds, reads, writes)
        for seconds, reads, writes in graph.operations
    ]
    return replace(graph, operations=tuple(operations))


def _again_from_codes(
    record: Record, keep: tuple[int, ...], there: frozenset[int]
) -> dict[int, list[CodedStorage]]:
    """Of what backward needs and is made again: the codes that the operations read which make it."""
    graph, codes = record.graph, {c.number: c for c in record.coded if c.number in keep}
    found: dict[int, list[CodedStorage]] = {}
    if graph is None or not codes:
        return found
    for storage in set(graph.saved) - there:
        again = graph.recipe([storage], there)
        read = {s for o in again for s in graph.operations[o][1] if s in codes}
        if read:
            found[storage] = [codes[s] for s in read]
    return found


def _squared_error(record: Record, keep: tuple[int, ...], move: tuple[int, ...]) -> float | Refusal:
    """Of what is kept as a code, and of what is made again from codes: as far off as those, or its own, would leave it."""
    own = {c.number: c for c in record.coded}
    total = sum(c.squared_error for c in record.coded if c.number in keep)
    for storage, codes in _again_from_codes(record, keep, frozenset((*keep, *move))).items():
        if not all(code.is_near for code in codes):
            return Refusal("operations would be run again on codes that are near to no tensor")
        if storage not in own:
            return Refusal("what would be made again from codes was not measured as a code")
        if not own[storage].is_smooth:
            return Refusal("signs or places would be made again from values that are a little off")
        errors = [own[storage].squared_error]
        for setting in {code.setting for code in codes}:
            cost = record.coding[setting]
            share = dict(cost.shares).get(storage)
            if share is None:
                return Refusal("what would be made again from a code was not measured with that")
            errors.append(cost.squared_error * share)
        total += max(errors)
    return total


@dataclass(frozen=True)
class SelectiveRecompute:
    """The storages that stay, and those that are moved, by their number in the order in which forward makes them.

    A storage in both stays; in ``move``, one that autograd does not save is made again where it is needed.
    """

    keep: tuple[int, ...] = ()
    move: tuple[int, ...] = ()

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.BLOCK
    paper: ClassVar[Paper] = Paper(
        "Reducing Activation Recomputation in Large Transformer Models",
        "Vijay Korthikanti, Jared Casper, Sangkug Lym, Lawrence McAfee, Michael Andersch, Mohammad Shoeybi, "
        "Bryan Catanzaro",
        2022,
        "2205.05198",
    )

    @classmethod
    def grades(cls, block: Block) -> Sequence[SelectiveRecompute]:
        """The points of the block's Pareto front of bytes kept and seconds added."""
        record = block.measured
        if record.graph is None or not record.graph.saved:
            return [cls()]
        transfers = Transfers(record.write_bytes_s, record.read_bytes_s)
        front = [cls(*point) for point in pareto_front(_readable(record.graph, record), transfers)]
        if record.coded:  # nothing is run again, and what has codes is kept as those
            front.append(cls(record.graph.saved))
        return front

    def offer(self, block: Block) -> Offer | Refusal:
        """``keep`` held, ``move`` written and read back, the rest made again by the operations that make it."""
        record = block.measured
        if record.graph is None:
            return Refusal("the block's calls differ from one another")
        if not record.saved_bytes:
            return Refusal("the block saves nothing for backward")
        if record.restore is not Restore.NONE:
            return Refusal("what the block saves already comes back in another way")
        graph = record.graph
        move = tuple(s for s in self.move if s in graph.saved and s not in self.keep)
        again = operations_again(graph, Point(self.keep, move))
        kept_bytes = sum(graph.num_bytes[s] for s in self.keep if s < len(graph.num_bytes))
        moved_bytes, handing_s = sum(graph.num_bytes[s] for s in move), HAND_OVER_S * len(move)
        coded = tuple(c for c in record.coded if c.number in self.keep)
        error = _squared_error(record, self.keep, move)
        if isinstance(error, Refusal):
            return error
        changed = replace(
            record,
            held_bytes=kept_bytes,
            restore=Restore.OPERATIONS,
            restore_s=sum(graph.operations[o][0] for o in again)
            + len(again) * RUN_S
            + moved_bytes / record.read_bytes_s
            + handing_s,
            store_s=len(graph.operations) * NOTE_S
            + moved_bytes / record.write_bytes_s
            + handing_s
            + sum(c.encode_s for c in coded),
            holds_inputs=True,
            kept=tuple(s for s in self.keep if s not in {c.number for c in coded}),
            moved=move,
            coded=coded,
            squared_error=error,
        )
        gone = sum(graph.num_bytes[s] for s in graph.saved if s not in {*self.keep, *move})
        note = (
            f"{format_bytes(gone)} made again by {len(again)} of {len(graph.operations)} operations"
        )
        if not gone:
            note = "nothing made again"
        return Offer(changed, f"{note}, {format_bytes(moved_bytes)} moved" if move else note)

    def attach(self, block: Block) -> Undo:
        """Run the block's forward under a tape."""
        host, move = block.live, frozenset(self.move) - frozenset(self.keep)
        codes = {s: code for s, code in host.codes.get(block.path, {}).items() if s in self.keep}
        keep, device = frozenset(self.keep) - codes.keys(), host.device
        store = store_of(host) if move else None

        def run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            moving = Moving(move, store, codes) if move or codes else None
            tape = Tape(keep, device, moving=moving)
            with tape:
                result = forward(*args, **kwargs)
            tape.end(returned_tensors(result))
            return result

        return wrap_forward(block.live.model.get_submodule(block.path), run)
