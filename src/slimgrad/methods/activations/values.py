"""What an operation tape notes: the values that storages held, and the operations that made them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from slimgrad.methods.activations.coded import Coded
from slimgrad.methods.activations.schedules import Holding
from slimgrad.storage.saved import MODIFIED, Geometry
from slimgrad.storage.stored import Stored

NOTE_S = 60e-6  # seconds that noting one operation takes, beside running it
RUN_S = 40e-6  # and running it again


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
        self._kept: torch.UntypedStorage | None = None
        self._shown_by: weakref.ref[Tensor] | None = (
            None  # below autograd an alias has no version in common
        )
        self._version = 0
        self._memo: torch.UntypedStorage | None = None
        self.stored: Stored | Coded | None = None  # outside the device, or as a code

    def keep(self, tensor: Tensor) -> None:
        """Hold the storage that ``tensor`` shows; it is never computed again, nor read back."""
        self._kept = tensor.untyped_storage()
        self.stored = None
        self._shown_by, self._version = weakref.ref(tensor), tensor._version

    def let_go(self) -> None:
        """Written over: it can only be computed again."""
        if self.made_by is not None:
            self._kept = None

    @property
    def is_kept(self) -> bool:
        """Whether it stays in memory."""
        return self._kept is not None

    @property
    def is_memo(self) -> bool:
        """Whether it was computed again, or read back, and is held for a while."""
        return self._memo is not None

    @property
    def is_away(self) -> bool:
        """Whether it is in the store alone, and backward has yet to ask for it."""
        return self.stored is not None and self._memo is None and self.num_handles > 0

    @property
    def here(self) -> torch.UntypedStorage | None:
        """Its storage, where it is in memory; raises RuntimeError where it was modified since."""
        if self._kept is None:
            return self._memo
        tensor = self._shown_by() if self._shown_by is not None else None
        if tensor is not None and tensor._version != self._version:
            raise RuntimeError(MODIFIED.format(f"shape {list(tensor.shape)}"))
        return self._kept

    def read_ahead(self) -> None:
        """Start reading it, where it is in the store alone."""
        if self.stored is not None and self._memo is None:
            self.stored.read_ahead()

    def fetched(self, holding: Holding) -> torch.UntypedStorage:
        """Its storage, read back where it is in the store alone."""
        storage = self.here
        if storage is None and self.stored is not None:
            storage = self.stored.read()
            self.found(storage, holding)
        return found_storage(storage)

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


class Argument(NamedTuple):
    """A tensor argument: a value and a geometry on it."""

    value: Value
    geometry: Geometry


@dataclass(eq=False, slots=True, weakref_slot=True)
class Operation:
    """One operation, ready to be run again.

    ``makes``: position among the leaves of its result, or -1 - position among its arguments where it writes into
    one, and the value that it makes there.
    """

    index: int
    stage: int
    func: Any
    leaves: list[Any]
    nest: Nest | None
    random: Any
    is_grad_enabled: bool  # kernels look: mkldnn's LSTM makes what backward needs only then
    makes: list[tuple[int, weakref.ref[Value]]] = field(default_factory=list)
    is_due: bool = False  # counted among those who will ask for what it reads
    reads: tuple[Value, ...] = ()  # the values of its arguments, once each

    def __post_init__(self) -> None:
        self.reads = tuple({leaf.value for leaf in self.leaves if type(leaf) is Argument})

    def becomes_due(self) -> None:
        """Count it among those who will ask."""
        if not self.is_due:
            self.is_due = True
            for value in self.reads:
                value.num_due += 1

    def is_off(self) -> None:
        """Count it among them no more."""
        if self.is_due:
            self.is_due = False
            for value in self.reads:
                value.num_due -= 1

    def run(self, holding: Holding) -> None:
        """Run it again; it is due, and everything it reads is in memory."""
        storages = {value: value.fetched(holding) for value in self.reads}
        written = {self.leaves[-1 - p].value for p, _ in self.makes if p < 0}
        self.is_off()
        for value in written:
            if value.is_kept or value.is_wanted(holding):
                storages[value] = copied(storages[value])
        leaves = [
            leaf.geometry.on(storages[leaf.value]) if type(leaf) is Argument else leaf
            for leaf in self.leaves
        ]
        args, kwargs = nested(leaves, self.nest)
        with _Random(self.random), torch.set_grad_enabled(self.is_grad_enabled):
            result = results(self.func(*args, **kwargs))
        for position, reference in self.makes:
            if (value := reference()) is not None and not value.is_kept:
                made = result[position] if position >= 0 else leaves[-1 - position]
                value.found(made.untyped_storage(), holding)
        for value in storages:
            value.settle(holding)


class Nest(NamedTuple):
    """How an operation's arguments lie in one list: an operation takes tensors, and lists of tensors, no deeper."""

    num_args: int
    names: tuple[str, ...]  # of the keyword arguments, which follow
    lengths: tuple[int, ...]  # of each argument; -1: it is no list of tensors


def flattened(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Nest | None]:
    """The arguments with those in lists of tensors, and how they lie; None: they are the arguments, one by one."""
    leaves: list[Any] = []
    lengths: list[int] = []
    for argument in (*args, *kwargs.values()):
        if type(argument) in (list, tuple) and any(isinstance(x, Tensor) for x in argument):
            lengths.append(len(argument))
            leaves += argument
        else:
            lengths.append(-1)
            leaves.append(argument)
    if not kwargs and len(leaves) == len(args) and max(lengths, default=-1) == -1:
        return leaves, None
    return leaves, Nest(len(args), tuple(kwargs), tuple(lengths))


def nested(leaves: Sequence[Any], nest: Nest | None) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments that ``flattened`` took apart."""
    if nest is None:
        return leaves, {}
    arguments: list[Any] = []
    position = 0
    for length in nest.lengths:
        if length < 0:
            arguments.append(leaves[position])
            position += 1
        else:
            arguments.append(list(leaves[position : position + length]))
            position += length
    return arguments[: nest.num_args], dict(
        zip(nest.names, arguments[nest.num_args :], strict=True)
    )


def results(out: Any) -> list[Any]:
    """What an operation returned, with what is in lists of tensors."""
    if isinstance(out, Tensor):
        return [out]
    return flattened(out, {})[0] if isinstance(out, (list, tuple)) else [out]


def recipe(wanted: Iterable[Value]) -> list[Operation]:
    """The operations that make the values ``wanted`` from what is in memory or stored, in the order in which they ran."""
    found: dict[int, Operation] = {}
    open_values = list(wanted)
    while open_values:
        value = open_values.pop()
        operation = value.made_by if value.stored is None else None
        if operation is not None and operation.index not in found and value.here is None:
            found[operation.index] = operation
            open_values += operation.reads
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
