"""Watches every operation and notes when each storage is born and freed. The ground of the ledger and of traces.

A storage is counted once, whoever holds it: tensors, views, saved variables, attributes. Its birth is the
operation whose output first shows it; its death is told by a weak reference, which torch keeps alive exactly as
long as the storage. One *tick* is one operation; a storage is live at tick ``t`` if ``birth <= t < death``.

What a storage was is decided at the end, when all is known:

- weights, optimizer state and inputs are named by their owners; a gradient is named when it is accumulated;
- an *activation* was born in a stretch of forward computation and outlived it. The forward pass is one stretch;
  so is each recomputation inside backward. It does not matter who keeps the tensor;
- everything else is a temporary.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from slimgrad.batches import named_tensors
from slimgrad.types import Column

FORWARD, BACKWARD, OPTIMIZER = 0, 1, 2

_DEVICE = (
    torch.ops.prim.device.default
)  # asked of fake tensors all the time: no operation of the step

current_task: Callable[[], int] = torch._C._current_graph_task_id
"""The running backward pass, or -1: what tells forward from backward on any thread."""


_PLAIN = (Tensor, nn.Parameter, FakeTensor)  # they wrap nothing
_ATOMS = (*_PLAIN, int, float, bool, str, type(None), torch.dtype, torch.device)


def _leaves(tree: Any) -> Iterable[Any]:
    """The leaves of a tree; of an operation's flat arguments without a walk."""
    kind = type(tree)
    if kind in _ATOMS:
        return (tree,)
    if kind is tuple or kind is list:
        if all(type(member) in _ATOMS for member in tree):
            return tree
        return [leaf for member in tree for leaf in _leaves(member)]
    return tree_leaves(tree) if kind is not dict or tree else ()


def plain_tensors(tree: Any) -> list[Tensor]:
    """Every tensor in a nest of containers, wrapper subclasses replaced by what they wrap."""
    found: list[Tensor] = []
    for leaf in _leaves(tree):
        if not isinstance(leaf, Tensor):
            continue
        if type(leaf) in _PLAIN:
            found.append(leaf)
        elif is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
            found += plain_tensors([getattr(leaf, name) for name in names])
        else:
            found.append(leaf)
    return found


def _is_only_promised(tensor: Tensor) -> bool:
    """Whether a tensor's values are computed when asked for (deferred logits): asking for its storage would."""
    return not isinstance(tensor, FakeTensor) and _dispatches(type(tensor))


@functools.cache
def _dispatches(kind: type[Tensor]) -> bool:
    return any("__torch_dispatch__" in vars(cls) for cls in kind.__mro__ if cls is not Tensor)


class Tracker(TorchDispatchMode):
    """Notes births and deaths of storages on ``device`` while it is entered.

    ``on_op(tick, func, args, kwargs, out)`` is called after each operation. Columns of lists, one entry a
    storage, in order of first sight: ``nbytes``, ``birth``, ``death`` (-1: alive), ``column`` (None: not yet
    known), ``module`` (index into ``module_paths``, -1: outside every module).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        *,
        inputs: Any = None,
        owned: Iterable[tuple[Column, Tensor]] = (),
        device: torch.device | None = None,
        on_op: Callable[[int, Any, Any, Any, Any], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.optimizer = model, optimizer
        self.device = device or device_of(model, inputs)
        self.tick = 0
        self.nbytes: list[int] = []
        self.birth: list[int] = []
        self.death: list[int] = []
        self.column: list[Column | None] = []
        self.module: list[int] = []
        self.in_backward_from: list[int] = []  # ticks at which a backward pass began
        self.optimizer_from: list[int] = []
        self.live_bytes = 0
        self.peak_bytes = 0
        self.module_paths: list[str] = []
        self._on_op = on_op
        self._ids: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._stack: list[int] = []
        self._path_index: dict[int, int] = {}
        self._stretch: tuple[int, int] | None = (-1, 0)
        self._stretch_born: list[int] = []
        self._task = -1
        self._handles: list[RemovableHandle] = []
        self._inputs, self._owned = inputs, list(owned)
        parameters = list(model.parameters()) if model is not None else []
        # a trace on fake tensors that is made meanwhile takes no memory
        self._is_real = bool(parameters) and not any(isinstance(p, FakeTensor) for p in parameters)

    # -- entering and leaving ------------------------------------------------------------------

    def __enter__(self) -> Tracker:
        if self.model is not None:
            for path, module in self.model.named_modules():
                self._path_index[id(module)] = len(self.module_paths)
                self.module_paths.append(path)
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                self.name(tensor, Column.WEIGHTS)
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients:
                self.name(gradient, Column.GRADIENTS)
            self._watch_gradients()
            self._watch_modules()
        if self.optimizer is not None:
            self._name_optimizer_state()
            self._handles += [
                self.optimizer.register_step_pre_hook(
                    lambda *_: self.optimizer_from.append(self.tick)
                ),
                self.optimizer.register_step_post_hook(lambda *_: self._name_optimizer_state()),
            ]
        for column, tensor in self._owned:
            self.name(tensor, column)
        for tensor in plain_tensors(list(named_tensors(self._inputs).values())):
            self.name(tensor, Column.INPUTS)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._end_stretch()
        if self.optimizer is not None:
            self._name_optimizer_state()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._references.clear()
        self._ids.clear()

    def _watch_gradients(self) -> None:
        assert self.model is not None
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(before_other_gradient_hooks(parameter, self._on_gradient))

    def _on_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.name(parameter.grad, Column.GRADIENTS)

    def _watch_modules(self) -> None:
        def enter(module: nn.Module, _: Any) -> None:
            self._stack.append(self._path_index.get(id(module), -1))

        def leave(module: nn.Module, _args: Any, _out: Any) -> None:
            if self._stack:
                self._stack.pop()

        self._handles += [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]

    # -- storages ------------------------------------------------------------------------------

    def name(self, tensor: Tensor, column: Column) -> None:
        """Say what the storage of ``tensor`` is; noted as there from the start if it is new."""
        for plain in plain_tensors(tensor):
            index = self.see(plain, born=0)
            if index is not None:
                self.column[index] = column

    def _name_optimizer_state(self) -> None:
        assert self.optimizer is not None
        for tensor in plain_tensors([dict(s) for s in self.optimizer.state.values()]):
            self.name(tensor, Column.OPTIMIZER_STATE)

    def see(self, tensor: Tensor, born: int | None = None) -> int | None:
        """The index of a tensor's storage, noting its birth if it is new; None on another device, or without memory."""
        if tensor.device.type != self.device.type or tensor.layout is not torch.strided:
            return None
        if _is_only_promised(tensor) or (self._is_real and type(tensor) is FakeTensor):
            return None
        storage = tensor.untyped_storage()
        key = storage._cdata
        index = self._ids.get(key)
        if index is None:
            index = len(self.nbytes)
            self._ids[key] = index
            self._references[key] = weakref.ref(storage, lambda _, k=key: self._freed(k))
            self.nbytes.append(storage.nbytes())
            self.birth.append(self.tick if born is None else born)
            self.death.append(-1)
            self.column.append(None if born is None else Column.INPUTS)
            self.module.append(self._stack[-1] if self._stack else -1)
            self._stretch_born.append(index)
            self._grow(storage.nbytes())
        return index

    def _grow(self, num_bytes: int) -> None:
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _freed(self, key: int) -> None:
        index = self._ids.pop(key, None)
        self._references.pop(key, None)
        if index is not None:
            self.death[index] = self.tick + 1
            self.live_bytes -= self.nbytes[index]

    # -- stretches of forward computation --------------------------------------------------------

    def _follow(self) -> None:
        """Close the current stretch of forward computation where the engine has moved on."""
        task = current_task()
        if task == -1:
            stretch: tuple[int, int] | None = (-1, 0)
        elif torch.is_grad_enabled():
            node = torch._C._current_autograd_node()
            stretch = (task, id(node))
        elif self._stretch is not None and self._stretch[0] == task and self._recomputing():
            stretch = self._stretch  # the forward of an autograd.Function inside a recomputation
        else:
            stretch = None
        if task != -1 and self._task == -1:
            self.in_backward_from.append(self.tick)
        self._task = task
        if stretch != self._stretch:
            self._end_stretch()
            self._stretch = stretch

    def _recomputing(self) -> bool:
        return bool(self._stack)

    def _end_stretch(self) -> None:
        if self._stretch is not None:
            for index in self._stretch_born:
                if self.death[index] == -1 and self.column[index] is None:
                    self.column[index] = Column.ACTIVATIONS
        self._stretch_born = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and note the storages it shows."""
        kwargs = kwargs or {}
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].device  # what the modes below would answer, after a long way
        if func.namespace == "prim":  # a question about a fake tensor, no operation
            return func(*args, **kwargs)
        self._follow()
        for tensor in plain_tensors((args, kwargs)):
            self.see(tensor, born=0)
        out = func(*args, **kwargs)
        self.tick += 1
        for tensor in plain_tensors(out):
            index = self.see(tensor)
            if index is not None and self.death[index] == -1:
                self._resized(index, tensor)
        if self._on_op is not None:
            self._on_op(self.tick, func, args, kwargs, out)
        return out

    def _resized(self, index: int, tensor: Tensor) -> None:
        num_bytes = tensor.untyped_storage().nbytes()
        if num_bytes != self.nbytes[index]:
            self._grow(num_bytes - self.nbytes[index])
            self.nbytes[index] = max(num_bytes, self.nbytes[index])


def device_of(model: nn.Module | None, inputs: Any = None) -> torch.device:
    """Where a model lives: the device of its first parameter or buffer, else of the first input."""
    if model is not None:
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    for tensor in named_tensors(inputs).values():
        return tensor.device
    return torch.device("cpu")


def before_other_gradient_hooks(
    parameter: Tensor, hook: Callable[[Tensor], None]
) -> RemovableHandle:
    """Call ``hook`` when the parameter's gradient completes, before hooks that may use it up and free it."""
    handle = parameter.register_post_accumulate_grad_hook(hook)
    hooks: Any = parameter._post_accumulate_grad_hooks
    others = [(key, other) for key, other in hooks.items() if key != handle.id]
    for key, _ in others:  # the engine walks the dict in order of insertion
        del hooks[key]
    hooks.update(others)
    return handle
