"""What an operation tape notes: the values that storages held, and the operations that made them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten, tree_unflatten

from slimgrad.methods.activations.saved import MODIFIED, Geometry
from slimgrad.methods.activations.schedules import Holding

NOTE_S = 15e-6  # seconds that noting one operation takes, beside running it
RUN_S = 20e-6  # and running it again


class Value:
    """What a storage holds between two writes; made in ``stage`` of what the tape runs over."""

    def __init__(self, tensor: Tensor, made_by: Operation | None, stage: int) -> None:
        storage = tensor.untyped_storage()
        self.made_by = made_by
        self.stage = self.last_stage = stage  # the last: of those operations run again that read it
        self.device = tensor.device.type
        self.identity = StorageWeakRef(storage)  # while it is held, no other storage has its cdata
        self.is_read = False
        self.num_handles = 0  # those not asked for yet
        self.num_due = 0  # operations yet to be run again that read it
        self._kept: Tensor | None = None
        self._shown_by: weakref.ref[Tensor] | None = (
            None  # below autograd an alias has no version in common
        )
        self._version = 0
        self._memo: torch.UntypedStorage | None = None

    def keep(self, tensor: Tensor) -> None:
        """Hold the storage that ``tensor`` shows; it is never computed again."""
        self._kept, self._shown_by, self._version = (
            tensor.detach(),
            weakref.ref(tensor),
            tensor._version,
        )

    def let_go(self) -> None:
        """Written over: it can only be computed again."""
        if self.made_by is not None:
            self._kept = None

    @property
    def is_kept(self) -> bool:
        """Whether it stays in memory."""
        return self._kept is not None

    @property
    def here(self) -> torch.UntypedStorage | None:
        """Its storage, where it is in memory; raises RuntimeError where it was modified since."""
        if self._kept is None:
            return self._memo
        tensor = self._shown_by() if self._shown_by is not None else None
        if tensor is not None and tensor._version != self._version:
            raise RuntimeError(MODIFIED.format(f"shape {list(tensor.shape)}"))
        return self._kept.untyped_storage()

    def is_wanted(self, holding: Holding) -> bool:
        """Whether, computed again, it is to be held for a while."""
        return (
            self.num_due > 0
            or (self.num_handles > 0 and self.stage in holding.stages)
            or holding.crosses(self.stage, self.last_stage)
        )

    def found(self, storage: torch.UntypedStorage, holding: Holding) -> None:
        """Computed again: held while anyone will ask."""
        if self._memo is None and self.is_wanted(holding):
            self._memo = storage

    def settle(self, holding: Holding) -> None:
        """Let go of what was computed again and nobody will ask for."""
        if self._memo is not None and not self.is_wanted(holding):
            self._memo = None

    def asked(self, holding: Holding) -> None:
        """One of the handles has it. A graph that is retained is asked more often than was counted."""
        self.num_handles = max(0, self.num_handles - 1)
        self.settle(holding)


@dataclass(frozen=True)
class Argument:
    """A tensor argument: a value and a geometry on it."""

    value: Value
    geometry: Geometry


@dataclass(eq=False)
class Operation:
    """One operation, ready to be run again.

    ``makes``: position among the leaves of its result, or -1 - position among its arguments where it writes into
    one, and the value that it makes there.
    """

    index: int
    stage: int
    func: Any
    leaves: list[Any]
    spec: Any
    random: Any
    is_grad_enabled: bool  # kernels look: mkldnn's LSTM makes what backward needs only then
    makes: list[tuple[int, weakref.ref[Value]]] = field(default_factory=list)
    is_due: bool = False  # counted among those who will ask for what it reads

    def reads(self) -> set[Value]:
        """The values of its arguments."""
        return {leaf.value for leaf in self.leaves if isinstance(leaf, Argument)}

    def becomes_due(self) -> None:
        """Count it among those who will ask."""
        if not self.is_due:
            self.is_due = True
            for value in self.reads():
                value.num_due += 1

    def is_off(self) -> None:
        """Count it among them no more."""
        if self.is_due:
            self.is_due = False
            for value in self.reads():
                value.num_due -= 1

    def run(self, holding: Holding) -> None:
        """Run it again; it is due, and everything it reads is in memory."""
        storages = {value: found_storage(value.here) for value in self.reads()}
        written = {self.leaves[-1 - p].value for p, _ in self.makes if p < 0}
        self.is_off()
        for value in written:
            if value.is_kept or value.is_wanted(holding):
                storages[value] = copied(storages[value])
        leaves = [
            leaf.geometry.on(storages[leaf.value]) if isinstance(leaf, Argument) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with _Random(self.random), torch.set_grad_enabled(self.is_grad_enabled):
            result = tree_flatten(self.func(*args, **kwargs))[0]
        for position, reference in self.makes:
            if (value := reference()) is not None and not value.is_kept:
                made = result[position] if position >= 0 else leaves[-1 - position]
                value.found(made.untyped_storage(), holding)
        for value in storages:
            value.settle(holding)


def recipe(wanted: Iterable[Value]) -> list[Operation]:
    """The operations that make the values ``wanted`` from what is in memory, in the order in which they ran."""
    found: dict[int, Operation] = {}
    open_values = list(wanted)
    while open_values:
        value = open_values.pop()
        operation = value.made_by
        if operation is not None and operation.index not in found and value.here is None:
            found[operation.index] = operation
            open_values += operation.reads()
    return [found[index] for index in sorted(found)]


def found_storage(storage: torch.UntypedStorage | None) -> torch.UntypedStorage:
    """``storage``, which must be there."""
    if storage is None:
        raise RuntimeError("an operation to be run again reads what is not in memory")
    return storage


def copied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Another storage with the same bytes."""
    whole = Geometry(torch.uint8, (storage.nbytes(),), (1,), 0).on(storage)
    return whole.clone().untyped_storage()


class _Random:
    """The random state of an operation's first run within the body, if it had one."""

    def __init__(self, state: tuple[torch.Generator, Tensor] | None) -> None:
        self._state = state
        self._now: Tensor | None = None

    def __enter__(self) -> None:
        if self._state is not None:
            generator, then = self._state
            self._now = generator.get_state()
            generator.set_state(then)

    def __exit__(self, *exc: Any) -> None:
        if self._state is not None and self._now is not None:
            self._state[0].set_state(self._now)
