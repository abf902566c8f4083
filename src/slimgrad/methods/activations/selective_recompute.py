"""Drops some of what a block saves for backward and runs again only the operations that make it.

Formula: a block's operations make the storages s; backward needs the set S. Keep K; what of S is not in K is made
    again from K and the block's inputs by the operations between. For a bound b on the bytes of K:
    minimise sum_o seconds(o) r(o)  subject to  sum_s bytes(s) k(s) <= b,
    r(o) >= 1 - k(s) for s in S and each o that writes s,  r(w) >= r(o) - k(s) for each s that o reads and w that writes s.
Memory: activations: K instead of S, and during the block's backward what is made again, each from when it is asked for
    to its last use. Time: the operations run again, and no other (r(o) = 1).
Exactness: bitwise: the same operations on the same values; operations that draw random numbers start from the
    state of their first run; batch norm's statistics are not touched. A forward pass that takes another path on the
    second run cannot differ, since it is not run a second time.
Limits: refused where the block saves nothing, or its calls differ from one another. What operations on tensor
    subclasses, and kernels that are no PyTorch operations, made stays in memory. Each operation of the block's forward
    pass costs some microseconds more.
References: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, section 5: recompute
    what takes much memory and little time. *departs:* what that is, is found by an integer programme over the measured
    bytes and seconds of the block's operations, not named by hand; whole operations are run again, below autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy.sparse import csr_array

from slimgrad.integer_programs import at_least, at_most, solve
from slimgrad.method import Block, Offer, OperationGraph, Paper, Refusal, Restore, Scope, Undo
from slimgrad.methods.activations.operation_tape import Tape
from slimgrad.methods.activations.saved import returned_tensors
from slimgrad.methods.activations.values import NOTE_S, RUN_S
from slimgrad.methods.activations.wrapping import wrap_forward
from slimgrad.types import Column, Exactness, format_bytes

_GRADES = (0.0, 0.03, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8)


@functools.lru_cache(maxsize=256)
def pareto_front(graph: OperationGraph) -> tuple[tuple[int, ...], ...]:
    """Sets of storages to keep, each the one with the least seconds for its bytes, leanest first."""
    saved = [s for s, is_saved in enumerate(graph.is_saved) if is_saved]
    total = sum(graph.num_bytes[s] for s in saved)
    found: dict[tuple[int, ...], tuple[float, float]] = {}
    for share in _GRADES:
        keep = _cheapest(graph, saved, share * total)
        if keep is not None:
            dropped = [s for s in saved if s not in keep]
            again = graph.recipe(dropped, frozenset(keep))
            seconds = sum(graph.operations[o][0] + RUN_S for o in again)
            found[keep] = (float(sum(graph.num_bytes[s] for s in keep)), seconds)
    front: list[tuple[int, ...]] = []
    least = float("inf")
    for keep, (_, seconds) in sorted(found.items(), key=lambda item: item[1]):
        if seconds < least and len(keep) < len(saved):
            front.append(keep)
            least = seconds
    return tuple(front)


def _cheapest(graph: OperationGraph, saved: Sequence[int], most: float) -> tuple[int, ...] | None:
    """The integer programme of the card, for one bound on the bytes kept."""
    num_storages, num_ops = len(graph.num_bytes), len(graph.operations)
    rows: list[tuple[dict[int, float], float]] = []  # sum of coefficient * x at least bound
    for storage in saved:
        rows += [({num_storages + o: 1.0, storage: 1.0}, 1.0) for o in graph.writers[storage]]
    for op, (_, reads, writes) in enumerate(graph.operations):
        for storage in set(reads) - set(writes):
            for writer in graph.writers[storage]:
                if writer < op:
                    row = {num_storages + writer: 1.0, num_storages + op: -1.0, storage: 1.0}
                    rows.append((row, 0.0))
    entries = [(i, column, v) for i, (row, _) in enumerate(rows) for column, v in row.items()]
    index = np.array([e[:2] for e in entries]).T
    at_least_rows = csr_array(
        ([e[2] for e in entries], index), shape=(len(rows), num_storages + num_ops)
    )
    sizes = np.array([*graph.num_bytes, *[0] * num_ops], dtype=float)
    seconds = np.array([o[0] + RUN_S for o in graph.operations])
    scale = max(float(sizes.sum()), 1.0)
    cost = np.concatenate(
        (1e-4 * sizes[:num_storages] / scale, seconds / max(seconds.sum(), 1e-12))
    )
    answer = solve(
        cost,
        [
            at_least(at_least_rows, np.array([b for _, b in rows])),
            at_most(sizes[None, :] / scale, np.array([most / scale])),
        ],
        is_integer=np.concatenate((np.ones(num_storages), np.zeros(num_ops))),
        upper=np.ones(num_storages + num_ops),
        gap=1e-2,
        limit_s=2.0,
    )
    if answer is None:
        return None
    return tuple(int(i) for i in np.flatnonzero(np.round(answer[:num_storages])))


@dataclass(frozen=True)
class SelectiveRecompute:
    """``keep``: the storages that stay, by their number in the order in which the block's forward makes them."""

    keep: tuple[int, ...] = ()

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
        graph = block.measured.graph
        if graph is None or not any(graph.is_saved):
            return [cls()]
        return [cls(keep) for keep in pareto_front(graph)]

    def offer(self, block: Block) -> Offer | Refusal:
        """``keep`` held, the rest made again by the operations that make it."""
        record = block.measured
        if record.graph is None:
            return Refusal("the block's calls differ from one another")
        if not record.saved_bytes:
            return Refusal("the block saves nothing for backward")
        if record.restore is not Restore.NONE:
            return Refusal("what the block saves already comes back in another way")
        graph = record.graph
        dropped = [s for s, saved in enumerate(graph.is_saved) if saved and s not in self.keep]
        again = graph.recipe(dropped, frozenset(self.keep))
        kept_bytes = sum(graph.num_bytes[s] for s in self.keep if s < len(graph.num_bytes))
        changed = replace(
            record,
            held_bytes=kept_bytes,
            restore=Restore.OPERATIONS,
            restore_s=sum(graph.operations[o][0] for o in again) + len(again) * RUN_S,
            store_s=len(graph.operations) * NOTE_S,
            holds_inputs=True,
            kept=self.keep,
        )
        freed = format_bytes(record.saved_bytes - kept_bytes)
        return Offer(
            changed, f"{freed} made again by {len(again)} of {len(graph.operations)} operations"
        )

    def attach(self, block: Block) -> Undo:
        """Run the block's forward under a tape."""
        keep, device = frozenset(self.keep), block.live.device

        def run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            tape = Tape(keep, device)
            with tape:
                result = forward(*args, **kwargs)
            tape.end(returned_tensors(result))
            return result

        return wrap_forward(block.live.model.get_submodule(block.path), run)
