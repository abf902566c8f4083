"""A tape of the operations of a block, from which single saved tensors are computed again in backward.

While the tape runs, every operation is noted with the *values* it read and wrote. A value is what a storage holds
from one write to the next: views need no note of their own (a tensor is a value and a geometry on it), and an
operation in place makes a new value of the same storage. What autograd saves is replaced by a handle on a value.
A value that is kept stays where it is; any other is let go, and when backward asks for it, the operations between
it and what was kept are run again, below autograd, each with the random state of its first run. Nothing else is:
what backward does not ask for is not computed, and what was computed is let go with its last use.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from slimgrad.measuring.trace import written_arguments
from slimgrad.methods.activations.saved import MODIFIED, Geometry, Kept, is_plain

# running statistics: written, though the schema does not tell, and in training without a part in what is returned
_STATISTICS = dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), (3, 4))
_TRAINING = 5  # position of their argument that tells whether they are in training
_EMPTY = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"]
)
_RESIZING = frozenset(["resize_", "resize_as_", "set_"])


class Value:
    """What a storage holds between two writes."""

    def __init__(self, tensor: Tensor, made_by: Operation | None) -> None:
        storage = tensor.untyped_storage()
        self.made_by = made_by
        self.device = tensor.device.type
        self.identity = StorageWeakRef(storage)  # while it is held, no other storage has its cdata
        self.is_read = False
        self.asks = 0  # handles not asked for yet, and operations yet to be run again that read it
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

    def found(self, storage: torch.UntypedStorage) -> None:
        """Computed again: held while anyone will ask."""
        if self.asks > 0 and self._memo is None:
            self._memo = storage

    def asked(self) -> None:
        """One of those who wanted it has it."""
        self.asks = max(
            0, self.asks - 1
        )  # a graph that is retained is asked more often than was counted
        if not self.asks:
            self._memo = None


@dataclass(frozen=True)
class _Argument:
    """A tensor argument: a value and a geometry on it."""

    value: Value
    geometry: Geometry


@dataclass
class Operation:
    """One operation, ready to be run again.

    ``makes``: position among the leaves of its result, or -1 - position among its arguments where it writes into
    one, and the value that it makes there.
    """

    index: int
    func: Any
    leaves: list[Any]
    spec: Any
    random: Any
    is_grad_enabled: bool  # kernels look: mkldnn's LSTM makes what backward needs only then
    makes: list[tuple[int, weakref.ref[Value]]] = field(default_factory=list)
    is_due: bool = False  # counted among those who will ask for what it reads

    def reads(self) -> set[Value]:
        """The values of its arguments."""
        return {leaf.value for leaf in self.leaves if isinstance(leaf, _Argument)}

    def becomes_due(self) -> None:
        """Count it among those who will ask."""
        if not self.is_due:
            self.is_due = True
            for value in self.reads():
                value.asks += 1

    def run(self) -> None:
        """Run it again; everything it reads is in memory."""
        storages = {value: _found(value.here) for value in self.reads()}
        written = {self.leaves[-1 - p].value for p, _ in self.makes if p < 0}
        for value in written:
            storage = storages[value]
            is_last = value.asks == 1 and not value.is_kept
            storages[value] = storage if is_last else _copy(storage)
        leaves = [
            leaf.geometry.on(storages[leaf.value]) if isinstance(leaf, _Argument) else leaf
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        with _Random(self.random), torch.set_grad_enabled(self.is_grad_enabled):
            result = tree_flatten(self.func(*args, **kwargs))[0]
        for position, reference in self.makes:
            if (value := reference()) is not None and not value.is_kept:
                made = result[position] if position >= 0 else leaves[-1 - position]
                value.found(made.untyped_storage())
        self.is_due = False
        for value in storages:
            value.asked()


@dataclass(frozen=True)
class Handle:
    """What autograd keeps in place of a saved tensor."""

    value: Value
    geometry: Geometry
    tape: Tape


class Tape(TorchDispatchMode):
    """Notes the operations of a block while it is entered.

    ``keep`` are the storages on ``device`` that stay, by their number in the order in which the block makes them;
    None: all.
    """

    def __init__(self, keep: frozenset[int] | None, device: torch.device) -> None:
        super().__init__()
        self._keep, self._device = keep, device
        self._index = itertools.count()
        self._newest: dict[int, Value] = {}  # of each storage met, by its cdata
        self._number: dict[int, int] = {}  # of each storage made here
        self._filled: set[int] = set()
        self._asked: weakref.WeakSet[Value] = weakref.WeakSet()
        self._hooks: Any = None

    # -- the first run ---------------------------------------------------------------------------------

    def __enter__(self) -> Tape:
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.__exit__(*exc)
        self._hooks = None

    def end(self, returned: Sequence[Tensor]) -> None:
        """The block has run: what it returned stays if backward asks for it; the recipes of what stays are cut."""
        for tensor in returned:
            value = self._newest.get(tensor.untyped_storage()._cdata)
            if value is not None and value.asks > 0:
                value.keep(tensor)
        for value in self._newest.values():
            if value.is_kept:
                value.made_by = None
        self._newest.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note it."""
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((tuple(args), kwargs))
        name = func._schema.name.rpartition("::")[2]
        if name in _STATISTICS and leaves[_TRAINING] is True:
            leaves = [None if i in _STATISTICS[name] else x for i, x in enumerate(leaves)]
        noted = [
            _Argument(self._value(x), Geometry.of(x)) if _is_plain_tensor(x) else x for x in leaves
        ]
        random, grad = _random_state(func, leaves), torch.is_grad_enabled()
        operation = Operation(next(self._index), func, noted, spec, random, grad)
        written = _written(func, spec, leaves)
        for position in written:
            self._before_write(noted[position])
        out = func(*args, **kwargs)
        self._note(operation, name, leaves, written, out)
        return out

    def _before_write(self, argument: Any) -> None:
        """A value from outside that earlier operations read, and may read again, is copied before it changes."""
        if isinstance(argument, _Argument):
            value = argument.value
            if value.made_by is None and value.is_read and (storage := value.here) is not None:
                value.keep(Geometry(torch.uint8, (storage.nbytes(),), (1,), 0).on(_copy(storage)))

    def _note(
        self, operation: Operation, name: str, leaves: list[Any], written: list[int], out: Any
    ) -> None:
        made = tree_flatten(out)[0]
        is_plain_one = all(is_plain(x) for x in (*leaves, *made) if isinstance(x, Tensor))
        repeatable = is_plain_one and name not in _RESIZING
        for value in operation.reads():
            value.is_read = True
        for position in written:
            tensor = leaves[position]
            if _is_plain_tensor(tensor):
                self._makes(operation, -1 - position, tensor, repeatable)
                self._filled.add(tensor.untyped_storage()._cdata)
        for position, tensor in enumerate(made):
            if not _is_plain_tensor(tensor):
                continue
            key = tensor.untyped_storage()._cdata
            if key not in self._newest:  # neither a view nor an argument returned
                if tensor.device.type == self._device.type:  # what is elsewhere stays there
                    self._number[key] = len(self._number)
                self._makes(operation, position, tensor, repeatable)
                if name not in _EMPTY:
                    self._filled.add(key)

    def _makes(self, operation: Operation, position: int, tensor: Tensor, repeatable: bool) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._newest:
            self._newest[key].let_go()
        value = self._newest[key] = Value(tensor, operation if repeatable else None)
        operation.makes.append((position, weakref.ref(value)))
        number = self._number.get(key)
        if not repeatable or number is None or self._keep is None or number in self._keep:
            value.keep(tensor)

    def _value(self, tensor: Tensor) -> Value:
        """The value that ``tensor`` shows now; that of a storage from outside is kept."""
        key = tensor.untyped_storage()._cdata
        known = self._newest.get(key)
        if known is None:
            known = self._newest[key] = Value(tensor, None)
        if known.is_kept or known.made_by is None:
            known.keep(
                tensor
            )  # again: the version rises only once the operation that wrote is over
        return known

    def _pack(self, tensor: Tensor) -> Handle | Kept:
        if not is_plain(tensor):
            return Kept.of(tensor)
        value, key = self._value(tensor), tensor.untyped_storage()._cdata
        if key in self._number and key not in self._filled:
            value.made_by = None  # filled by something that is no operation: it cannot be run again
            value.keep(tensor)
        if value.made_by is None:
            return Kept.of(tensor)
        value.asks += 1
        self._asked.add(value)
        return Handle(value, Geometry.of(tensor), self)

    # -- backward --------------------------------------------------------------------------------------

    def restore(self, value: Value) -> torch.UntypedStorage:
        """The storage of ``value``, computed again where it is not in memory."""
        if (storage := value.here) is not None:
            return storage
        for asked in list(self._asked):
            for operation in _recipe(asked):
                operation.becomes_due()
        self._asked.clear()
        value.asks += 1  # so that it is held until it is returned
        with torch.autocast(value.device, enabled=False):
            recipe = _recipe(value)
            for operation in recipe:
                operation.becomes_due()
            for operation in recipe:
                operation.run()
        storage = _found(value.here)
        value.asks -= 1
        return storage


def _recipe(value: Value) -> Sequence[Operation]:
    """The operations that make ``value`` from what is in memory, in the order in which they ran."""
    found: dict[int, Operation] = {}
    open_values = [value]
    while open_values:
        wanted = open_values.pop()
        operation = wanted.made_by
        if wanted.here is None and operation is not None and operation.index not in found:
            found[operation.index] = operation
            open_values += operation.reads()
    return [found[index] for index in sorted(found)]


def _unpack(packed: Handle | Kept) -> Tensor:
    if isinstance(packed, Kept):
        return packed.checked()
    tensor = packed.geometry.on(packed.tape.restore(packed.value))
    packed.value.asked()
    return tensor


def _found(storage: torch.UntypedStorage | None) -> torch.UntypedStorage:
    if storage is None:
        raise RuntimeError("an operation to be run again reads what is not in memory")
    return storage


def _copy(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    whole = Geometry(torch.uint8, (storage.nbytes(),), (1,), 0).on(storage)
    return whole.clone().untyped_storage()


def _is_plain_tensor(leaf: Any) -> TypeGuard[Tensor]:
    return isinstance(leaf, Tensor) and is_plain(leaf)


def _written(func: Any, spec: Any, leaves: list[Any]) -> list[int]:
    """Positions among ``leaves`` of the arguments that the operation writes into."""
    if not func._schema.is_mutable:
        return []
    args, kwargs = tree_unflatten(list(range(len(leaves))), spec)
    positions = tree_flatten(written_arguments(func, args, kwargs))[0]
    return [i for i in positions if isinstance(i, int)]


def _random_state(func: Any, leaves: list[Any]) -> tuple[torch.Generator, Tensor] | None:
    """The generator that the operation draws from and its state, if it draws."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return None
    generator = next((x for x in leaves if isinstance(x, torch.Generator)), None)
    if generator is None:
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        generator = _default_generator(device)
    return generator, generator.get_state()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.empty(0, device=device).device.index]
    return torch.default_generator


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
