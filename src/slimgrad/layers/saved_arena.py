"""A chain of modules whose saved tensors lie in one piece of memory that is there before the step, each in its place.

Formula: the first step notes for each storage that autograd saves its bytes, and the instants between which backward may
    ask for it; offsets are those of the smallest arena that ``slimgrad.arena`` finds. In later steps a storage is
    copied to its place when it is saved. With ``num_segments`` = m the chain is cut into m parts: all but the last are
    run again in backward, and save then, into places that earlier parts have left.
Memory: activations: one arena, at least the most saved bytes that are live at once (``bound_bytes``), which stays between
    steps; nothing else that is saved is allocated or freed, so it cannot be torn apart. Beside it what an operation
    saves is there twice until the next ones let go of it. Time: each saved byte is copied once a step.
Exactness: bitwise: the same operations on the same values; in parts that are run again, random numbers and buffers are
    those of the first run.
Limits: steps are like the first: other shapes, or another path through the code, raise ``PlanError``, and so does a second
    forward pass while backward may still ask for what the first one saved (one step at a time). Modules take and
    return one tensor. The chain's input, parameters and buffers stay where they are, and so do tensor subclasses. A saved
    tensor that is modified in place afterwards has the value that was saved (plain autograd raises). No double backward
    through parts that are run again.
References: Pisarchyk and Lee (2020), sections 4 and 5, greedy by size and by breadth. *departs:* the paper places the
    intermediate tensors of inference (``arena_inference``); here it is what training saves between forward and backward.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from slimgrad.arena import ALIGNMENT, Arena, Lifetimes, layouts
from slimgrad.errors import ArgumentError, PlanError
from slimgrad.layers.replayed_call import ReplayedCall
from slimgrad.method import Paper, component
from slimgrad.single_backward import single_backward
from slimgrad.storage.saved import Geometry, Kept, is_plain
from slimgrad.storage.stored import whole_storage
from slimgrad.types import Column, Exactness, format_bytes


class _Held:
    """One saved storage, by its number in the order of saving, as long as autograd keeps anything of it."""

    def __init__(self, run: _Run, number: int, whole: Tensor) -> None:
        self.source = StorageWeakRef(whole.untyped_storage())  # nothing else gets its identity
        self.number = number
        self.bytes = run.kept(number, whole)
        self._run = weakref.ref(run)

    def offset_of(self, tensor: Tensor) -> int:
        """Where ``tensor`` begins, in its elements, on what is kept; -1 where it is something else."""
        if tensor.untyped_storage()._cdata != self.bytes.untyped_storage()._cdata:
            return -1
        begin = tensor.data_ptr() - self.bytes.data_ptr()
        return begin // tensor.element_size() if 0 <= begin < self.bytes.nbytes else -1

    def __del__(self) -> None:
        run = self._run() if hasattr(self, "_run") else None
        if run is not None:
            run.let_go(self.number)


@dataclass(frozen=True)
class _Packed:
    """What autograd keeps in place of a saved tensor; ``run`` is there as long as anything of it is kept."""

    held: _Held
    geometry: Geometry
    run: _Run


class _Run:
    """One forward and backward pass: what is saved in it, each storage once."""

    def __init__(self, stays: frozenset[int]) -> None:
        self._stays = stays
        self._held: weakref.WeakValueDictionary[tuple[int, int], _Held] = (
            weakref.WeakValueDictionary()
        )
        self._given: _Held | None = None
        self.num_saved = self.num_live = 0
        self.was_asked = False  # by a backward pass

    @contextmanager
    def saving(self, given: Kept | _Packed | None = None) -> Generator[None]:
        """In the body what is saved is kept here; ``given`` is what it starts from, which is kept already."""
        self._given = given.held if isinstance(given, _Packed) else None
        try:
            with saved_tensors_hooks(self.pack, unpack):
                yield
        finally:
            self._given = None

    def pack(self, tensor: Tensor) -> Kept | _Packed:
        """Keep ``tensor``'s storage, unless it stays where it is."""
        given = self._given
        if given is not None and is_plain(tensor) and (offset := given.offset_of(tensor)) >= 0:
            return _Packed(given, Geometry.of(tensor)._replace(offset=offset), self)
        whole = whole_storage(tensor) if is_plain(tensor) else None
        if whole is None or not whole.numel() or tensor.untyped_storage()._cdata in self._stays:
            return Kept.of(tensor)
        key = tensor.untyped_storage()._cdata, tensor._version
        held = self._held.get(key)
        if held is None:
            held = self._held[key] = _Held(self, self.num_saved, whole)
            self.num_saved += 1
            self.num_live += 1
        return _Packed(held, Geometry.of(tensor), self)

    def kept(self, number: int, whole: Tensor) -> Tensor:
        """Where storage ``number`` is from now on."""
        raise NotImplementedError

    def let_go(self, number: int) -> None:
        """Autograd keeps nothing of storage ``number`` any more."""
        self.num_live -= 1


class _Noting(_Run):
    """The first step: storages stay where they are, and their lifetimes are noted."""

    def __init__(self, stays: frozenset[int]) -> None:
        super().__init__(stays)
        self._now = 0
        self.rows: list[list[int]] = []

    def kept(self, number: int, whole: Tensor) -> Tensor:
        self._now += 1
        self.rows.append([whole.untyped_storage().nbytes(), self._now, self._now + 1])
        return whole

    def let_go(self, number: int) -> None:
        super().let_go(number)
        self._now += 1
        self.rows[number][2] = self._now

    def lifetimes(self) -> Lifetimes:
        """Of every storage, in the order in which they were saved."""
        return Lifetimes(*np.array(self.rows, dtype=np.int64).reshape(-1, 3).T).aligned()


class _Placing(_Run):
    """A later step: storages are copied to their places."""

    def __init__(
        self, stays: frozenset[int], memory: Tensor, sizes: Sequence[int], offsets: np.ndarray
    ) -> None:
        super().__init__(stays)
        self._memory, self._sizes, self._offsets = memory, sizes, offsets
        self._first = -memory.data_ptr() % ALIGNMENT
        self._is_live = np.zeros(len(sizes), dtype=bool)
        self._ends = offsets + np.array(sizes)

    def kept(self, number: int, whole: Tensor) -> Tensor:
        num_bytes = whole.untyped_storage().nbytes()
        if number >= len(self._sizes) or self._sizes[number] != num_bytes:
            raise PlanError(
                f"expected the saved tensors of the first step, found one of {format_bytes(num_bytes)} as number "
                f"{number}: the path depends on the inputs; make another SavedArena"
            )
        lower, upper = self._offsets < self._ends[number], self._offsets[number] < self._ends
        if (self._is_live & lower & upper).any():
            raise PlanError(
                "a saved tensor's place is taken by one that the first step had let go of by then: do not retain the "
                "graph (retain_graph=True), or make another SavedArena whose first step does"
            )
        self._is_live[number] = True
        begin = self._first + int(self._offsets[number])
        place = self._memory[begin : begin + num_bytes]
        place.copy_(whole.view(torch.uint8))
        return place

    def let_go(self, number: int) -> None:
        super().let_go(number)
        self._is_live[number] = False


def unpack(packed: Kept | _Packed) -> Tensor:
    """The tensor, on the storage that is kept."""
    if isinstance(packed, Kept):
        return packed.checked()
    geometry, kept = packed.geometry, packed.held.bytes
    packed.run.was_asked = True
    first: int = int(kept.storage_offset()) * kept.element_size() // geometry.dtype.itemsize
    moved = geometry._replace(offset=geometry.offset + first)
    return moved.on(kept.untyped_storage())


@component(
    Column.ACTIVATIONS,
    Exactness.BITWISE,
    Paper(
        "Efficient Memory Management for Deep Neural Net Inference",
        "Yury Pisarchyk, Juhyun Lee",
        2020,
        "2001.03288",
    ),
)
class SavedArena(nn.Module):
    """``chain = SavedArena(blocks)`` is ``nn.Sequential(*blocks)`` whose saved tensors lie in an arena from the second step on.

    After the first backward pass ``arena`` tells the rule, the offsets and the bytes, ``lifetimes`` those of the saved
    storages, ``bound_bytes`` the most that is live at once, ``first_fit_bytes`` what an allocator takes that cannot look
    ahead. Raises ``ArgumentError`` for a number of segments that the chain does not have, and ``PlanError`` where a step
    is not like the first.
    """

    arena: Arena
    lifetimes: Lifetimes
    bound_bytes: int
    first_fit_bytes: int

    def __init__(self, blocks: Sequence[nn.Module], num_segments: int = 1) -> None:
        super().__init__()
        blocks = list(blocks)
        if not 1 <= num_segments <= len(blocks):
            raise ArgumentError(
                f"expected between 1 and {len(blocks)} segments of {len(blocks)} blocks, found {num_segments}"
            )
        bounds = [len(blocks) * i // num_segments for i in range(num_segments + 1)]
        self.segments = nn.ModuleList(
            nn.Sequential(*blocks[a:b]) for a, b in itertools.pairwise(bounds)
        )
        self._form: Any = None
        self._noting: _Noting | None = None
        self._memory: Tensor | None = None
        self._last: weakref.ref[_Run] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The output of the chain's last module."""
        if not torch.is_grad_enabled():
            for segment in self.segments:
                x = segment(x)
            return x
        run = self._next_run(x)
        with run.saving():
            for segment in list(self.segments)[:-1]:
                parameters = [p for p in segment.parameters() if p.requires_grad]
                x = cast(Tensor, _Segment.apply(x, run, segment, *parameters))
            return self.segments[-1](x)

    def _next_run(self, x: Tensor) -> _Run:
        last = self._last() if self._last is not None else None
        if last is not None and last.num_live:
            raise PlanError(
                f"backward may still ask for {last.num_live} tensors that the last forward pass saved: run its backward "
                "pass, or let go of its output, before the next forward pass"
            )
        form = (tuple(x.shape), x.dtype, x.device, x.requires_grad, self.training)
        if self._noting is not None and self._noting.was_asked and self._form == form:
            self._lay_out(self._noting, x.device)
        if self._memory is not None and self._form != form:
            raise PlanError(
                f"expected an input like the first step's, {self._form}, got {form}: make another SavedArena"
            )
        tensors = (x, *self.parameters(), *self.buffers())
        stays = frozenset(t.untyped_storage()._cdata for t in tensors)
        if self._memory is None:
            run = self._noting = _Noting(stays)
            self._form = form
        else:
            run = _Placing(stays, self._memory, self._sizes, self.arena.offsets)
        self._last = weakref.ref(run)
        return run

    def _lay_out(self, noted: _Noting, device: torch.device) -> None:
        self._noting = None
        self._sizes = [nbytes for nbytes, _, _ in noted.rows]
        self.lifetimes = noted.lifetimes()
        found = layouts(self.lifetimes)
        self.arena, self.bound_bytes = found[0], self.lifetimes.bound
        self.first_fit_bytes = next(a.nbytes for a in found if a.rule == "first fit")
        self._memory = torch.empty(self.arena.nbytes + ALIGNMENT, dtype=torch.uint8, device=device)


class _Segment(torch.autograd.Function):
    """A part of the chain that saves its input, and what it saves besides when it is run again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: _Run, segment: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.kept = run.pack(x)
        ctx.run, ctx.segment, ctx.parameters = run, segment, parameters
        ctx.call = ReplayedCall(segment, x.device)
        return ctx.call.first(lambda: segment(x))

    @staticmethod
    @single_backward("saved_arena")
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise PlanError("expected one backward pass: what was saved was let go in the first")
        leaf = unpack(kept).detach().requires_grad_(ctx.needs_input_grad[0])
        with ctx.run.saving(kept), torch.enable_grad():
            del kept
            y = ctx.call.again(lambda: ctx.segment(leaf))
        wanted = [t for t in (leaf, *ctx.parameters) if t.requires_grad]
        found = list(torch.autograd.grad(y, wanted, grads[0], allow_unused=True))
        grad_x = found.pop(0) if leaf.requires_grad else None
        return (grad_x, None, None, *found)
