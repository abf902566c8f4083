"""A tape of the operations of a block, from which single saved tensors are computed again in backward.

While the tape runs, every operation is noted with the *values* it read and wrote. A value is what a storage holds
from one write to the next: views need no note of their own (a tensor is a value and a geometry on it), and an
operation in place makes a new value of the same storage. What autograd saves is replaced by a handle on a value.
A value that is kept stays where it is; any other is let go, and when backward asks for it, the operations between
it and what was kept are run again, below autograd, each with the random state of its first run. Nothing else is:
what backward does not ask for is not computed, and what was computed is let go with its last use. A value that is
moved is in the store, and is read back in place of being computed again.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.code import origin_after
from slimgrad.measuring.trace import written_arguments
from slimgrad.methods.activations.moving import Moving
from slimgrad.methods.activations.schedules import Holding
from slimgrad.methods.activations.values import (
    Argument,
    Nest,
    Operation,
    Value,
    copied,
    flattened,
    nested,
    recipe,
    results,
)
from slimgrad.storage.saved import Geometry, Kept, is_plain

# running statistics: written, though the schema does not tell, and in training without a part in what is returned
_STATISTICS = dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), (3, 4))
_TRAINING = 5  # position of their argument that tells whether they are in training
_EMPTY = frozenset(
    ["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"]
)
_RESIZING = frozenset(["resize_", "resize_as_", "set_"])


class Handle(NamedTuple):
    """What autograd keeps in place of a saved tensor."""

    value: Value
    geometry: Geometry
    tape: Tape


class Tape(TorchDispatchMode):
    """Notes the operations of a block while it is entered.

    ``keep`` are the storages on ``device`` that stay, by their number in the order in which the block makes them;
    None: all. A tape that is entered for several blocks, one after the other, has a stage for each; ``holdings``
    says what is held when backward is at a stage. ``moving`` has the storages that are moved out of memory.
    """

    def __init__(
        self,
        keep: frozenset[int] | None,
        device: torch.device,
        holdings: Sequence[Holding] = (Holding(frozenset({0})),),
        moving: Moving | None = None,
    ) -> None:
        super().__init__()
        self._keep, self._device, self._moving = keep, device, moving
        self.holdings = holdings
        self.holding = holdings[-1]
        self.stage = 0
        self._passed: list[tuple[weakref.ref[Tensor], int]] = []  # from a stage, and its version
        self._turned_to: int | None = None  # the stage that backward is at
        self._due: list[weakref.ref[Operation]] = []
        self._found: list[weakref.ref[Value]] = []  # computed again, and held for a while
        self._index = itertools.count()
        self._newest: dict[int, Value] = {}  # of each storage met, by its cdata
        self._number: dict[int, int] = {}  # of each storage made here
        self._origin: dict[int, int] = {}  # and what was done till then
        self._done = 0
        self._filled: set[int] = set()
        self._asked: dict[int, list[weakref.ref[Value]]] = {}  # by stage
        self._hooks: Any = None

    # -- the first run ---------------------------------------------------------------------------------

    def __enter__(self) -> Tape:
        for reference, version in self._passed:
            tensor = reference()
            if tensor is not None and tensor._version != version:  # written between two blocks
                self._newest.pop(tensor.untyped_storage()._cdata, None)
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._hooks.__exit__(*exc)
        self._hooks = None
        if self._moving is not None and exc[0] is not None:
            self._moving.stop()

    def next_stage(self, returned: Sequence[Tensor]) -> None:
        """One block has run and ``returned`` these; the next is to come."""
        self._passed = [(weakref.ref(tensor), tensor._version) for tensor in returned]
        self.stage += 1

    def end(self, returned: Sequence[Tensor]) -> None:
        """The block has run: what it returned stays if backward asks for it; the recipes of what stays are cut."""
        for tensor in returned:
            value = self._newest.get(tensor.untyped_storage()._cdata)
            if value is not None and value.num_handles > 0:
                value.keep(tensor)
        if self._moving is not None:
            self._moving.end()
        for value in self._newest.values():
            if value.is_kept or value.stored is not None:
                value.made_by = None
        self._newest.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note it."""
        kwargs, kind = kwargs or {}, _kind(func)
        if kind.is_of_interpreter:
            return func(*args, **kwargs)
        if kind.is_view:  # it reads and makes no value
            for x in args:
                if isinstance(x, Tensor) and is_plain(x):
                    self._value(x)
            return func(*args, **kwargs)
        leaves, nest = flattened(args, kwargs)
        if kind.statistics and leaves[_TRAINING] is True:
            leaves = [None if i in kind.statistics else x for i, x in enumerate(leaves)]
        noted = [
            Argument(self._value(x), Geometry.of(x)) if isinstance(x, Tensor) and is_plain(x) else x
            for x in leaves
        ]
        random = _random_state(leaves) if kind.is_random else None
        grad = torch.is_grad_enabled()
        operation = Operation(next(self._index), self.stage, func, noted, nest, random, grad)
        if self._moving is not None:
            self._moving.start_writes()
        written = _written(func, nest, leaves) if kind.is_mutable else []
        for position in written:
            self._before_write(noted[position])
        out = func(*args, **kwargs)
        self._note(operation, kind.name, leaves, written, out)
        return out

    def _before_write(self, argument: Any) -> None:
        """A value from outside that earlier operations read, and may read again, is copied before it changes.

        One that is being moved has to be in the store.
        """
        if isinstance(argument, Argument):
            value = argument.value
            if value.stored is not None:
                value.stored.written()
            if value.made_by is None and value.is_read and (storage := value.here) is not None:
                value.keep(Geometry(torch.uint8, (storage.nbytes(),), (1,), 0).on(copied(storage)))

    def _note(
        self, operation: Operation, name: str, leaves: list[Any], written: list[int], out: Any
    ) -> None:
        made = [(i, x) for i, x in enumerate(results(out)) if isinstance(x, Tensor)]
        plain = [(i, x) for i, x in made if is_plain(x)]
        is_plain_one = len(plain) == len(made) and not any(
            isinstance(x, Tensor) for x in operation.leaves
        )
        repeatable = is_plain_one and name not in _RESIZING
        for value in operation.reads:
            value.is_read = True
        for position in written:
            if type(operation.leaves[position]) is Argument:
                tensor = leaves[position]
                self._makes(operation, -1 - position, tensor, repeatable)
                self._filled.add(tensor.untyped_storage()._cdata)
        for position, tensor in plain:
            key = tensor.untyped_storage()._cdata
            if key not in self._newest:  # neither a view nor an argument returned
                if tensor.device.type == self._device.type:  # what is elsewhere stays there
                    self._number[key] = len(self._number)
                    self._origin[key] = self._done = origin_after(name, self._done)
                self._makes(operation, position, tensor, repeatable)
                if name not in _EMPTY:
                    self._filled.add(key)

    def _makes(self, operation: Operation, position: int, tensor: Tensor, repeatable: bool) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._newest:
            self._newest[key].let_go()
        value = self._newest[key] = Value(tensor, operation if repeatable else None, self.stage)
        operation.makes.append((position, weakref.ref(value)))
        number = self._number.get(key)
        if not repeatable or number is None or self._keep is None or number in self._keep:
            value.keep(tensor)

    def _value(self, tensor: Tensor) -> Value:
        """The value that ``tensor`` shows now; that of a storage from outside is kept."""
        key = tensor.untyped_storage()._cdata
        known = self._newest.get(key)
        if known is None:
            known = self._newest[key] = Value(tensor, None, self.stage)
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
        value.num_handles += 1
        if value.num_handles == 1:
            self._asked.setdefault(value.stage, []).append(weakref.ref(value))
        if self._moving is not None:
            self._moving.add(self._number.get(key), self._origin.get(key, 0), value, tensor)
        return Handle(value, Geometry.of(tensor), self)

    # -- backward --------------------------------------------------------------------------------------

    def restore(self, value: Value) -> torch.UntypedStorage:
        """The storage of ``value``, computed again or read back where it is not in memory."""
        if (storage := value.here) is not None:
            return storage
        self._turn_to(value.stage)
        if self._moving is not None:
            self._moving.read_ahead(value)
        value.num_due += 1  # so that it is held until it is returned
        operations = recipe([value])
        with torch.autocast(value.device, enabled=False):
            for operation in operations:
                operation.becomes_due()
            for operation in operations:
                operation.run(self.holding)
        if len(self.holdings) > 1:
            for operation in operations:
                self._found += [ref for _, ref in operation.makes if (v := ref()) and v.is_memo]
        storage = value.fetched(self.holding)
        value.num_due -= 1
        return storage

    def _turn_to(self, stage: int) -> None:
        """Backward has come to ``stage``: let go of what is not held for it, and count who will ask."""
        first, holding = self._turned_to is None, self.holdings[stage]
        self._turned_to = stage
        if not first and holding is self.holding:
            return
        self.holding = holding
        if first and len(self.holdings) > 1:
            for operation in recipe(self._asked_in(self._asked)):
                for value in operation.reads:
                    value.last_stage = max(value.last_stage, operation.stage)
        for reference in self._due:
            if (operation := reference()) is not None:
                operation.is_off()
        for reference in self._found:
            if (value := reference()) is not None:
                value.settle(holding)
        self._found = [ref for ref in self._found if (v := ref()) and v.is_memo]
        wanted = [v for v in self._asked_in(holding.stages) if v.num_handles]
        due = [operation for operation in recipe(wanted) if operation.stage in holding.stages]
        for operation in due:
            operation.becomes_due()
        self._due = [weakref.ref(operation) for operation in due]

    def _asked_in(self, stages: Iterable[int]) -> list[Value]:
        references = itertools.chain.from_iterable(self._asked.get(s, ()) for s in stages)
        return [value for reference in references if (value := reference()) is not None]


def _unpack(packed: Handle | Kept) -> Tensor:
    if isinstance(packed, Kept):
        return packed.checked()
    tensor = packed.geometry.on(packed.tape.restore(packed.value))
    packed.value.asked(packed.tape.holding)
    return tensor


class _Kind(NamedTuple):
    """What is the same for all calls of an operation."""

    name: str
    is_of_interpreter: bool
    is_view: bool
    is_mutable: bool
    is_random: bool
    statistics: tuple[int, ...]


@functools.cache
def _kind(func: Any) -> _Kind:
    name = func._schema.name.rpartition("::")[2]
    is_random = torch.Tag.nondeterministic_seeded in func.tags
    statistics = _STATISTICS.get(name, ())
    is_of_interpreter = func.namespace == "prim"
    return _Kind(
        name, is_of_interpreter, func.is_view, func._schema.is_mutable, is_random, statistics
    )


def _written(func: Any, nest: Nest | None, leaves: list[Any]) -> list[int]:
    """Positions among ``leaves`` of the arguments that the operation writes into."""
    args, kwargs = nested(range(len(leaves)), nest)
    found: list[int | None] = []  # None: left out
    for positions in written_arguments(func, args, kwargs):
        found += positions if isinstance(positions, list) else [positions]
    return [position for position in found if position is not None]


def _random_state(leaves: list[Any]) -> tuple[torch.Generator, Tensor]:
    """The generator that a random operation draws from, and its state."""
    generator = next((x for x in leaves if isinstance(x, torch.Generator)), None)
    if generator is None:
        device = next((x.device for x in leaves if isinstance(x, Tensor)), torch.device("cpu"))
        generator = _default_generator(device)
    return generator, generator.get_state()


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.empty(0, device=device).device.index]
    return torch.default_generator
