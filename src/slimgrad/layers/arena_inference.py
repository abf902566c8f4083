"""Inference in one arena: every intermediate tensor has its place before the model runs, and none is allocated.

Formula: offset(i) = the smallest gap, between the tensors that are live together with i and lie already, that
    i fits in; the largest first (by size), or those of the instant with the most live bytes first (by breadth)
Memory: temporaries take one arena, at most a few hundredths above the most bytes that are live at once; an operation
    that cannot write into a given place has its result beside its place for a moment (``beside_bytes``).
Exactness: bitwise: the same operations on the same values. Outputs are the caller's, outside the arena.
Limits: shapes, dtypes and the path through the code are those of the example: other inputs raise ``PlanError`` and
    are run by a new object; no gradients; one call at a time; what the model keeps beyond a call (a cache) would be
    overwritten by the next one, and raises ``PlanError``.
References: Pisarchyk and Lee (2020), sections 4 and 5. *departs:* of all rules the smallest arena is taken, which is
    compared with the live bytes as a lower bound; in-place operations and views need no place of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from slimgrad.arena import ALIGNMENT, Arena, Lifetimes, layouts
from slimgrad.errors import PlanError
from slimgrad.measuring.tracker import Tracker, plain_tensors
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness, format_bytes


@dataclass(frozen=True)
class _Place:
    """Where an output of an operation lies: its storage's offset in the arena, and how the tensor lies on that."""

    offset: int
    num_bytes: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Operation:
    """One operation of the plan: what is run, and the places of those of its outputs that are new."""

    func: Any
    places: tuple[_Place | None, ...]


@component(
    Column.TEMPORARIES,
    Exactness.BITWISE,
    Paper(
        "Efficient Memory Management for Deep Neural Net Inference",
        "Yury Pisarchyk, Juhyun Lee",
        2020,
        "2001.03288",
    ),
)
class ArenaInference:
    """``infer = ArenaInference(model, *example)``, then ``infer(*inputs)`` is ``model(*inputs)`` without gradients.

    The example is run once, plainly. ``arena`` tells the rule, the offsets and the size in bytes; ``bound_bytes`` is
    the most that is live at once; ``first_fit_bytes`` what an allocator takes that cannot look ahead; ``total_bytes``
    all that is ever made. ``PlanError`` where later inputs have other shapes or take another path.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.model = model
        recorder = _Recorder(model, (args, kwargs))
        self._inputs = _form((args, kwargs))
        with torch.no_grad(), recorder.tracker:
            recorder.finish(model(*args, **kwargs))
        lifetimes, storages = recorder.lifetimes()
        found = layouts(lifetimes)
        self.arena: Arena = found[0]
        self.bound_bytes = lifetimes.bound
        self.total_bytes = lifetimes.total_bytes
        self.first_fit_bytes = next(a.nbytes for a in found if a.rule == "first fit")
        offsets = dict(zip(storages, self.arena.offsets.tolist(), strict=True))
        self._operations = recorder.operations(offsets)
        self.beside_bytes = max(
            (
                sum(p.num_bytes for p in o.places if p is not None)
                for o in self._operations
                if _writing(o.func) is None
            ),
            default=0,
        )
        self._memory = torch.empty(
            self.arena.nbytes + ALIGNMENT, dtype=torch.uint8, device=recorder.tracker.device
        )
        self._first = -self._memory.data_ptr() % ALIGNMENT

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for inputs of the example's shapes, dtypes and devices."""
        form = _form((args, kwargs))
        if form != self._inputs:
            raise PlanError(
                f"expected inputs like the example's, {self._inputs[1]}, got {form[1]}: make another ArenaInference"
            )
        running = _Running(self._operations, self._memory, self._first)
        with running:
            output = self.model(*args, **kwargs)
        running.check_end()
        return output

    def __str__(self) -> str:
        above = self.arena.nbytes / max(self.bound_bytes, 1) - 1
        return (
            f"arena of {format_bytes(self.arena.nbytes)} ({self.arena.rule}), {above:.1%} above the live bytes; "
            f"first fit {format_bytes(self.first_fit_bytes)}, nothing shared {format_bytes(self.total_bytes)}"
        )


def _form(tree: Any) -> tuple[str, tuple[Any, ...]]:
    """What a plan depends on: the tree, and each tensor's shape, strides, dtype and device; other leaves by value."""
    leaves, spec = tree_flatten(tree)
    told = tuple(
        (tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else repr(x)
        for x in leaves
    )
    return str(spec), told


class _Recorder:
    """One plain run: each operation, and the storages that are born in it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.tracker = Tracker(model, inputs=inputs, on_op=self._on_op)
        self._outputs: set[int | None] = set()
        self._metas: list[tuple[Any, list[tuple[int, Any] | None]]] = []

    def _on_op(self, tick: int, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        places: list[tuple[int, Any] | None] = []
        for tensor in plain_tensors(out):
            index = self.tracker.see(tensor)
            is_new = index is not None and self.tracker.birth[index] == tick
            form = (tensor.dtype, tuple(tensor.shape), tensor.stride())
            places.append((index, form) if is_new and index is not None else None)
        self._metas.append((func, places))

    def finish(self, output: Any) -> None:
        """The run is over, with ``output``; nothing of it is kept."""
        self._outputs = {self.tracker.see(tensor) for tensor in plain_tensors(output)}

    def lifetimes(self) -> tuple[Lifetimes, list[int]]:
        """Those of the storages born on the way, and their numbers; outputs are the caller's."""
        tracker = self.tracker
        born = {p[0] for _, places in self._metas for p in places if p is not None}
        storages = [s for s in sorted(born) if tracker.nbytes[s] and s not in self._outputs]
        which = np.array(storages, dtype=np.int64)
        nbytes, birth, death = (
            np.array(values, dtype=np.int64)[which]
            for values in (tracker.nbytes, tracker.birth, tracker.death)
        )
        if np.any(death < 0):
            raise PlanError(
                "the model keeps tensors that it made beyond the call, which the next call would overwrite: switch "
                "its cache off (use_cache=False)"
            )
        return Lifetimes(nbytes, birth, np.maximum(death, birth + 1)).aligned(), storages

    def operations(self, offsets: dict[int, int]) -> list[_Operation]:
        """The plan, once every storage has its offset."""
        return [
            _Operation(
                func,
                tuple(
                    None
                    if place is None or place[0] not in offsets
                    else _Place(offsets[place[0]], self.tracker.nbytes[place[0]], *place[1])
                    for place in places
                ),
            )
            for func, places in self._metas
        ]


class _Running(TorchDispatchMode):
    """Runs the operations of a plan, each with its outputs in their places."""

    def __init__(self, operations: Sequence[_Operation], memory: Tensor, first: int) -> None:
        super().__init__()
        self._operations, self._memory, self._first = operations, memory, first
        self._next = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` in its place; raises ``PlanError`` where the plan has another operation."""
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        planned = self._operations[self._next] if self._next < len(self._operations) else None
        if planned is None or planned.func is not func:
            expected = planned.func if planned is not None else "the end"
            raise PlanError(
                f"expected {expected} as operation {self._next}, the model ran {func}: its path depends on the "
                "inputs; make another ArenaInference"
            )
        self._next += 1
        if not any(place is not None for place in planned.places):
            return func(*args, **kwargs)
        outs = [None if place is None else self._at(place) for place in planned.places]
        writing = _writing(func)
        if writing is None or any(out is None for out in outs):
            return _moved(func(*args, **kwargs), outs)
        if writing == "copy":
            (out,) = outs
            assert out is not None
            return out.copy_(args[0])
        overload, names = writing
        return overload(*args, **kwargs, **dict(zip(names, outs, strict=True)))

    def _at(self, place: _Place) -> Tensor:
        begin = self._first + place.offset
        whole = self._memory[begin : begin + place.num_bytes].view(place.dtype)
        return whole.as_strided(place.size, place.stride)

    def check_end(self) -> None:
        """Raise ``PlanError`` where the model ran fewer operations than the example."""
        if self._next != len(self._operations):
            raise PlanError(
                f"expected {len(self._operations)} operations, the model ran {self._next}: its path depends on the "
                "inputs; make another ArenaInference"
            )


def _moved(out: Any, places: Sequence[Tensor | None]) -> Any:
    """``out`` with each tensor that has a place copied there."""
    left = iter(places)

    def move(tensor: Tensor) -> Tensor:
        place = next(left)
        return tensor if place is None else place.copy_(tensor)

    return tree_map_only(Tensor, move, out)


_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}


@functools.cache
def _writing(func: Any) -> Any:
    """How ``func`` writes into given tensors: its overload for that with the names of those, "copy", or None.

    Only overloads with a kernel of their own count: the others run the operation and copy what it made.
    """
    if func in _COPIES:
        return "copy"
    given = [(a.name, str(a.type)) for a in func._schema.arguments]
    for name in func._overloadpacket.overloads():
        overload = getattr(func._overloadpacket, name)
        arguments = overload._schema.arguments
        outs = [a.name for a in arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if outs and others == given and len(outs) == len(func._schema.returns):
            keys = ("CPU", "CUDA")
            if any(
                torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), key) for key in keys
            ):
                return overload, outs
    return None
