"""Runs a chain of blocks again from its first input, whole or part by part: segments, and segments inside them.

Formula: a segment is blocks f_1 ... f_n, each fed by the one before. Of it only the input of f_1 stays. When backward
    reaches f_n, f_1 ... f_n are run again, and what a *schedule* says is held: everything that backward asks for, or
    of some parts only what enters them, which are then run a third time, and so on. The best schedule within m bytes:
    C(s, t, m) = min( f_s + C(s+1, t, m - saved_s),
                      min_i f_s + ... + f_(i-1) + C(i, t, m - entering_i) + C(s, i, m) ).
Memory: activations: with k segments of n/k equal blocks, k inputs and what n/k blocks save: O(sqrt n); with segments
    halved again and again, O(log n). Time: one more forward pass of the segment, or at most log n.
Exactness: bitwise: the same operations on the same values; operations that draw random numbers start from the
    state of their first run; batch norm's statistics are not touched.
Limits: blocks that are called one right after the other, each with the output of the one before. What is done to a
    tensor between two blocks is not run again: its result stays. What operations on tensor subclasses, and kernels that
    are no PyTorch operations, made stays in memory. Each operation of the forward pass costs some microseconds more.
    Where that would be more than 2 % of it, blocks are run again as modules, and nothing is noted of their operations:
    only where they write into nothing they were given, nothing is done between them, and nothing else needs what they
    make. A block that takes another path then, or one whose arguments or parameters were modified, raises in backward;
    forward hooks inside it run again where they return a value.
References: Chen et al., Training Deep Nets with Sublinear Memory Cost, algorithm 1 and section 4.4 (recursion);
    Beaumont et al., Optimal Checkpointing for Heterogeneous Chains (arXiv 1911.13214), theorem 1, for the schedule
    within a segment. *departs:* where segments begin is chosen by the planner; where single operations take
    long they, not modules, are run again, below autograd, and only those that what backward asks for depends on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from slimgrad.errors import MethodError
from slimgrad.method import (
    Block,
    Offer,
    OperationGraph,
    Paper,
    Record,
    Refusal,
    Restore,
    Scope,
    Undo,
)
from slimgrad.methods.activations.operation_tape import Tape
from slimgrad.methods.activations.repeated_modules import STAGE_S, RepeatedModules
from slimgrad.methods.activations.schedules import Chain, best_schedules, holdings
from slimgrad.methods.activations.values import NOTE_S, RUN_S
from slimgrad.methods.activations.wrapping import wrap_forward
from slimgrad.storage.saved import returned_tensors
from slimgrad.types import Column, Exactness, format_bytes

_MOST_NOTING = (
    0.02  # of a forward pass: where noting its operations takes more, modules are run again
)


def chain_of(graph: OperationGraph, keep: Sequence[int]) -> Chain:
    """What the stages of a graph cost when the storages ``keep`` stay and the rest is made again."""
    kept = frozenset(keep)
    dropped = [s for s, saved in enumerate(graph.is_saved) if saved and s not in kept]
    again = graph.recipe(dropped, kept)
    seconds, saved = [0.0] * graph.num_stages, [0] * graph.num_stages
    first, last = dict[int, int](), dict[int, int]()
    for index in again:
        stage, (cost, reads, writes) = graph.stage_of(index), graph.operations[index]
        seconds[stage] += cost + RUN_S
        for storage in writes:
            first.setdefault(storage, stage)
        for storage in reads:
            last[storage] = max(last.get(storage, stage), stage)
    for storage in dropped:
        saved[first[storage]] += graph.num_bytes[storage]
    entering = [0] * (graph.num_stages + 1)  # as differences from one border to the next
    for storage, made in first.items():
        entering[made + 1] += graph.num_bytes[storage]
        entering[max(last.get(storage, made), made) + 1] -= graph.num_bytes[storage]
    border = itertools.accumulate(entering[: graph.num_stages])
    return Chain(tuple(seconds), tuple(saved), tuple(border))


@dataclass(frozen=True)
class NestedRecompute:
    """``blocks``: the paths of the segment, in order; ``schedule``: as in ``schedules``; ``keep``: storages that stay;
    ``by_modules``: whether modules are run again, not operations.

    An empty ``schedule`` holds everything of the segment once backward has reached it. ``keep`` are the numbers of
    storages, in the order in which the segment's forward makes them, that other parts of the step keep alive anyway.
    Without ``blocks`` the segment is the block, or the blocks in a row, that it is attached to.
    """

    blocks: tuple[str, ...] = ()
    schedule: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    by_modules: bool = False

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.RUN
    paper: ClassVar[Paper] = Paper(
        "Training Deep Nets with Sublinear Memory Cost",
        "Tianqi Chen, Bing Xu, Chiyuan Zhang, Carlos Guestrin",
        2016,
        "1604.06174",
    )

    def __post_init__(self) -> None:
        if any(code < 0 for code in self.schedule):
            raise MethodError(
                f"a schedule has no negative numbers, found {min(self.schedule)} in {self.schedule}"
            )

    @classmethod
    def grades(cls, block: Block) -> Sequence[NestedRecompute]:
        """The segment with the fastest schedules for a falling number of bytes."""
        record = block.measured
        if record.graph is None:
            return [cls(block.paths)]
        found = best_schedules(chain_of(record.graph, record.held_anyway))
        noting_s = len(record.graph.operations) * NOTE_S
        by_modules = record.are_repeatable and noting_s > _MOST_NOTING * record.forward_s
        return [cls(block.paths, schedule, record.held_anyway, by_modules) for schedule in found]

    def offer(self, block: Block) -> Offer | Refusal:
        """Nothing held but the input; the rest made again, segment by segment."""
        record: Record = block.measured
        if record.graph is None:
            return Refusal("the calls of the blocks differ from one another")
        if not record.saved_bytes:
            return Refusal("the blocks save nothing for backward")
        if record.restore is not Restore.NONE:
            return Refusal("what the blocks save already comes back in another way")
        changed = replace(
            record,
            held_bytes=0,
            restore=Restore.OPERATIONS,
            store_s=len(block.paths) * STAGE_S
            if self.by_modules
            else len(record.graph.operations) * NOTE_S,
            holds_inputs=True,
            kept=self.keep,
            schedule=self.schedule,
            by_modules=self.by_modules,
        )
        nested = ", in nested parts" if any(self.schedule) else ""
        freed = f"{format_bytes(record.saved_bytes)} of {len(block.paths)} blocks in a row"
        return Offer(changed, f"{freed} made again from the first one's input{nested}")

    def attach(self, block: Block) -> Undo:
        """Run the forward passes of the blocks under one tape."""
        model, device = block.live.model, block.live.device
        paths = self.blocks or block.paths or (block.path,)
        state = _Segment(len(paths))

        def run_stage(stage: int) -> Callable[..., Any]:
            def run(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                if stage == 0:
                    found = holdings(self.schedule, len(paths))
                    state.tape = Tape(frozenset(self.keep), device, found)
                return state.run(stage, forward, args, kwargs)

            def run_module(forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                if stage == 0:
                    found = holdings(self.schedule, len(paths))
                    state.modules = RepeatedModules(found, device)
                module = model.get_submodule(paths[stage])
                return state.run_module(stage, module, forward, args, kwargs)

            return run_module if self.by_modules else run

        return Undo.all(
            [
                wrap_forward(model.get_submodule(path), run_stage(stage))
                for stage, path in enumerate(paths)
            ]
        )


class _Segment:
    """Where a forward pass is in its segment."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.tape: Tape | None = None
        self.modules: RepeatedModules | None = None

    def run_module(
        self, stage: int, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """One block, to be run again as it is, where the blocks before it are; else plainly."""
        modules, self.modules = self.modules, None
        if modules is None or len(modules.stages) != stage:
            return forward(*args, **kwargs)
        result = modules.run(module, forward, args, kwargs)
        if stage == self.num_stages - 1:
            modules.end()
        else:
            self.modules = modules
        return result

    def run(self, stage: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One block: under the tape where the blocks before it were, else plainly."""
        tape = self.tape
        if tape is None or tape.stage != stage:
            self.tape = None
            return forward(*args, **kwargs)
        with tape:
            result = forward(*args, **kwargs)
        if stage == self.num_stages - 1:
            tape.end(returned_tensors(result))
            self.tape = None
        else:
            tape.next_stage(returned_tensors(result))
        return result
