"""One step as a list of operations and storage lifetimes: what a simulator needs, and nothing else."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._autograd import _get_sequence_nr

from slimgrad.errors import LossError
from slimgrad.host import LossFn, Share
from slimgrad.measuring.buffers import Buffers
from slimgrad.measuring.clock import OpKey, op_key
from slimgrad.measuring.fake import faked
from slimgrad.measuring.ledger import InsideCompiled, MemoryTimeline, timeline_of
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.tracker import Tracker, current_task, plain_tensors
from slimgrad.measuring.workspaces import fill_workspaces
from slimgrad.types import Column

_FAMILIES = frozenset(
    ["elu_backward", "softplus_backward"]
)  # of functions, one for each set of numbers


@dataclass
class Call:
    """One call of a block's module: its forward is ticks ``[forward_from, forward_to)``.

    ``inputs`` and ``outputs`` are storages that cross its border.
    """

    path: str
    forward_from: int
    forward_to: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    nodes: tuple[int, int] = (0, 0)  # sequence numbers of the autograd nodes made inside


@dataclass
class Trace:
    """Storages and operations of a forward and backward pass.

    One entry a storage: ``nbytes``, ``birth``, ``death`` (ticks; past the end: alive at the end), ``column``
    (position in ``Column``). One entry a tick: ``op`` (position in ``keys``), ``op_call`` (position in
    ``calls``, -1: none), ``op_backward``. ``gradients`` maps a parameter's name to its gradient's storage and
    the tick at which it was complete. ``cached`` maps storages that autocast's weight cache holds, whoever else
    does, to the tick at which it lets go. ``reads`` and ``writes`` are the storages of each operation's arguments,
    and of those that it made or wrote into, one entry a tick. ``dtypes`` and ``row`` (elements along the fastest
    dimension) say how each storage was first shown (``""`` and 0: not known), ``name`` gives each tick's operation a
    place in ``names`` (``""``: a view). ``op_node`` is the sequence number of the autograd
    node that an operation in backward belongs to, -1 in forward. ``is_timed``: do ``op_seconds`` sum to those of real passes?
    """

    nbytes: np.ndarray
    birth: np.ndarray
    death: np.ndarray
    column: np.ndarray
    num_ticks: int
    op: np.ndarray
    op_call: np.ndarray
    op_backward: np.ndarray
    calls: list[Call]
    gradients: dict[str, tuple[int, int]]
    module: np.ndarray
    module_paths: list[str]
    op_seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    op_node: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    is_timed: bool = False
    num_shares: int = 1
    cached: dict[int, int] = field(default_factory=dict)
    reads: list[tuple[int, ...]] = field(default_factory=list)
    writes: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    row: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    names: list[str] = field(default_factory=list)
    name: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def backward_from(self) -> int:
        """The tick at which the first backward pass begins."""
        at = np.flatnonzero(self.op_backward)
        return int(at[0]) if at.size else self.num_ticks

    def timeline(self) -> MemoryTimeline:
        """Live bytes by column after each operation."""
        marks = [(c.forward_from, c.path) for c in self.calls]
        marks.append((self.backward_from, "backward begins"))
        return timeline_of(
            self.nbytes, self.birth, self.death, self.column, self.num_ticks, sorted(marks)
        )


class _Recorder:
    """Follows the calls of blocks and the operations of one step."""

    def __init__(self, tracker_for: Any, block_paths: Sequence[str], model: nn.Module) -> None:
        self.keys: dict[OpKey, int] = tracker_for
        self.calls: list[Call] = []
        self.around: list[int] = []  # for each call, the one that it is made in; -1: none
        self.open: list[int] = []
        self.op: list[int] = []
        self.op_call: list[int] = []
        self.op_backward: list[bool] = []
        self.op_node: list[int] = []
        self.reads: list[tuple[int, ...]] = []
        self.writes: list[tuple[int, ...]] = []
        self.shown: dict[int, tuple[str, int]] = {}  # storage -> dtype and row of what made it
        self.names: dict[str, int] = {}
        self.name: list[int] = []
        self.gradients: dict[str, tuple[int, int]] = {}
        self.cast: list[int] = []  # ticks at which autocast made a copy of a weight, and cached it
        self.tracker: Tracker | None = None
        self._caching: list[bool] = []  # for each open call: was it made under a caching autocast?
        self._handles: list[Any] = []
        self._last = -1
        self._first_nodes: list[int] = []
        self._call_of: dict[int, int] = {}  # autograd node, by its number -> its call
        for path in block_paths:
            module = model.get_submodule(path)
            self._handles.append(
                module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
            )
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(self._complete(name))
                )

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            assert self.tracker is not None
            if current_task() != -1:
                return
            met = (self.tracker.see(t, born=0) for t in plain_tensors((args, kwargs)))
            seen = {storage for storage in met if storage is not None}
            nodes = (_get_sequence_nr(), 0)
            call = Call(path, self.tracker.tick, -1, tuple(sorted(seen)), (), nodes)
            self.around.append(self.open[-1] if self.open else -1)
            self.open.append(len(self.calls))
            self._first_nodes.append(nodes[0])
            self._call_of.clear()
            self.calls.append(call)
            self._caching.append(_autocast_caches(self.tracker.device.type))

        return hook

    def _leave(self, _module: nn.Module, _args: Any, out: Any) -> None:
        assert self.tracker is not None
        if current_task() != -1 or not self.open:
            return
        call = self.calls[self.open.pop()]
        self._caching.pop()
        call.forward_to = self.tracker.tick
        call.nodes = (call.nodes[0], _get_sequence_nr())
        self._call_of.clear()
        inside = isinstance(out, (Tensor, tuple, list, dict))
        leaves = plain_tensors(out if inside else getattr(out, "__dict__", out))
        met = (self.tracker.see(tensor) for tensor in leaves)
        call.outputs = tuple(sorted({storage for storage in met if storage is not None}))

    def _complete(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            assert self.tracker is not None
            storage = self.tracker.see(parameter.grad) if parameter.grad is not None else None
            if storage is not None:
                self.gradients[name] = (storage, self.tracker.tick)

        return hook

    def on_op(self, tick: int, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        assert self.tracker is not None
        read = self._storages((args, kwargs))
        made = [i for i in self._storages(out) if self.tracker.birth[i] == tick]
        self.reads.append(tuple(read))
        self.writes.append((*made, *self._storages(written_arguments(func, args, kwargs))))
        if made:
            self._show(out)
        self.name.append(self.names.setdefault(_name(func, args), len(self.names)))
        backward = current_task() != -1
        casts = func is torch.ops.aten._to_copy.default and not backward and any(self._caching)
        if casts and args[0].is_leaf and args[0].requires_grad:
            self.cast.append(tick)
        node: Any = torch._C._current_autograd_node() if backward else None
        if backward:
            self._last = self._call_of_node(node)
        self.op_node.append(_sequence_number(node))
        call = self._last if backward else (self.open[-1] if self.open else -1)
        key = op_key(func, args, kwargs)
        self.op.append(self.keys.setdefault(key, len(self.keys)))
        self.op_call.append(call)
        self.op_backward.append(backward)

    def _storages(self, tree: Any) -> list[int]:
        """The storages of the tensors in ``tree``, each once, in their order."""
        assert self.tracker is not None
        met = (self.tracker.see(tensor) for tensor in plain_tensors(tree))
        return list(dict.fromkeys(storage for storage in met if storage is not None))

    def _show(self, out: Any) -> None:
        assert self.tracker is not None
        for tensor in plain_tensors(out):
            storage = self.tracker.see(tensor)
            if storage is not None and storage not in self.shown:
                self.shown[storage] = str(tensor.dtype).removeprefix("torch."), _row(tensor)

    def _call_of_node(self, node: Any) -> int:
        number = _sequence_number(node)
        if number < 0:
            return self._last
        if number not in self._call_of:
            self._call_of[number] = self._found_call(number)
        return self._call_of[number]

    def _found_call(self, number: int) -> int:
        """The last call that made a node: nodes are numbered as they are made, and so are calls."""
        index = bisect.bisect_right(self._first_nodes, number) - 1
        while index >= 0 and number >= self.calls[index].nodes[1]:
            index = self.around[index]
        return index

    def cached(self, tracker: Tracker) -> dict[int, int]:
        """Autocast's copies of weights, and when its cache lets go: at the end of that forward pass."""
        born = {birth: index for index, birth in enumerate(tracker.birth)}
        backward = np.flatnonzero(self.op_backward)
        ends = [int(backward[backward >= tick].min(initial=tracker.tick)) for tick in self.cast]
        return {born[t]: end + 1 for t, end in zip(self.cast, ends, strict=True) if t in born}


def written_arguments(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The arguments that the operation's schema says it writes into."""
    schema = func._schema
    if not schema.is_mutable:
        return []
    return [
        args[position] if position < len(args) else kwargs.get(argument.name)
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _name(func: Any, args: tuple[Any, ...]) -> str:
    """An operation's name, with its numbers where it is another function with others; ``""`` of a view."""
    name = "" if func.is_view else func._schema.name.rpartition("::")[2]
    if name not in _FAMILIES:
        return name
    return f"{name}({', '.join(f'{a:g}' for a in args if isinstance(a, int | float))})"


def _row(tensor: Tensor) -> int:
    """Elements along the dimension that is contiguous in memory."""
    return max((n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s == 1), default=1)


def _autocast_caches(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.is_autocast_cache_enabled()


def _sequence_number(node: Any) -> int:
    """An autograd node's; -1 of none, and of AccumulateGrad, which has no place of its own."""
    number = node._sequence_nr() if node is not None else -1
    return number if number < 2**62 else -1


def trace_step(
    model: nn.Module,
    loss_fn: LossFn,
    shares: Sequence[Share],
    block_paths: Sequence[str],
    keys: dict[OpKey, int],
    *,
    fake: bool = True,
    inside_compiled: bool = False,
) -> Trace:
    """Run one forward and backward pass for each share and note every storage and operation.

    On fake tensors nothing is allocated. On real ones the model's buffers, gradients and the random state are
    put back afterwards. ``keys`` collects the distinct operations over several traces. With ``inside_compiled``
    compiled code runs, and its buffers and the operations that it calls are noted; else it gives way to plain code.

    Raises ``LossError`` where the loss is not a scalar with a gradient.
    """
    batches = [share.batch for share in shares]
    if fake:
        with faked(model, *batches) as fakes:
            fake_shares = [Share(b, s.weight) for b, s in zip(fakes, shares, strict=True)]
            trace = _trace(model, loss_fn, fake_shares, block_paths, keys)
        fill_workspaces(trace, keys)
        return trace
    with untouched(model):
        tracking = InsideCompiled if inside_compiled else Tracker
        return _trace(model, loss_fn, shares, block_paths, keys, tracking)


class untouched:  # noqa: N801
    """Puts back a model's buffers and gradients and every random state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.buffers = Buffers.of(self.model)
        self.gradients = [(p, p.grad) for p in self.model.parameters()]
        for parameter, _ in self.gradients:
            parameter.grad = None
        self.random = RandomState.now()

    def __exit__(self, *exc: Any) -> None:
        self.random.restore()
        self.buffers.restore()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient


def _trace(
    model: nn.Module,
    loss_fn: LossFn,
    shares: Sequence[Share],
    block_paths: Sequence[str],
    keys: dict[OpKey, int],
    tracking: type[Tracker] = Tracker,
) -> Trace:
    recorder = _Recorder(keys, block_paths, model)
    tracker = tracking(model, inputs=[s.batch for s in shares], on_op=recorder.on_op)
    recorder.tracker = tracker
    try:
        with tracker:
            for share in shares:
                loss = checked_loss(loss_fn(model, share.batch))
                (loss if share.weight == 1 else loss * share.weight).backward()
                del loss
    finally:
        recorder.close()
        for parameter in model.parameters():
            parameter.grad = None
    return _trace_of(tracker, recorder, len(shares))


def checked_loss(loss: Any) -> Tensor:
    """``loss`` if it is a scalar tensor with a gradient; raises ``LossError`` saying what it is instead."""
    if not isinstance(loss, Tensor):
        raise LossError(
            f"loss_fn must return a scalar tensor, but returned {type(loss).__name__}: "
            "return the loss alone, for example model(**batch).loss"
        )
    if loss.numel() != 1:
        raise LossError(
            f"loss_fn must return a scalar, but returned a tensor of shape {tuple(loss.shape)}: "
            "reduce it with .mean() or .sum()"
        )
    if not loss.requires_grad:
        raise LossError(
            "the loss has no gradient: was it computed under torch.no_grad(), detached, or does no "
            "parameter require a gradient?"
        )
    return loss


def _trace_of(tracker: Tracker, recorder: _Recorder, num_shares: int) -> Trace:
    order = {column: position for position, column in enumerate(Column)}
    end = tracker.tick + 1
    return Trace(
        nbytes=np.array(tracker.nbytes, dtype=np.int64),
        birth=np.array(tracker.birth, dtype=np.int64),
        death=np.array([d if d >= 0 else end for d in tracker.death], dtype=np.int64),
        column=np.array([order[c or Column.TEMPORARIES] for c in tracker.column], dtype=np.int64),
        num_ticks=tracker.tick,
        op=np.array(recorder.op, dtype=np.int64),
        op_call=np.array(recorder.op_call, dtype=np.int64),
        op_backward=np.array(recorder.op_backward, dtype=bool),
        op_node=np.array(recorder.op_node, dtype=np.int64),
        calls=recorder.calls,
        gradients=recorder.gradients,
        module=np.array(tracker.module, dtype=np.int64),
        module_paths=list(tracker.module_paths),
        num_shares=num_shares,
        cached=recorder.cached(tracker),
        reads=recorder.reads,
        writes=recorder.writes,
        dtypes=[recorder.shown.get(i, ("", 0))[0] for i in range(len(tracker.nbytes))],
        row=np.array([recorder.shown.get(i, ("", 0))[1] for i in range(len(tracker.nbytes))]),
        names=list(recorder.names),
        name=np.array(recorder.name, dtype=np.int64),
    )
