"""Compiled forward passes: one compiled code for all that are alike, and its buffers seen by the ledger.

``torch.compile`` keeps its compiled code with the code object of the function. So all instances of a class share
one store, which blocks of other shapes would make it believe that shapes change from call to call. Here each set
of shapes has a code object of its own.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from slimgrad.host import LossFn

_MAKERS = {"empty_strided_cpu": "cpu", "empty_strided_cuda": "cuda"}


def cpp_compiler() -> str | None:
    """The C++ compiler that torch.compile would use on this machine, or None."""
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else ["g++", "clang++", "c++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def compiled(module: nn.Module) -> Callable[..., Any]:
    """The forward pass of ``module`` through ``torch.compile``, shared by all modules of its class and shapes.

    One graph or an error at the first call: a graph break would leave a part that nobody measured. Where another
    dispatch mode watches, which compiled code would escape, the plain forward pass runs: torch.compile would give
    up the function for good.
    """
    forward = module.forward
    function = getattr(forward, "__func__", None)
    twin = forward if function is None else _twin(function, _shapes(module)).__get__(module)
    run: Callable[..., Any] = torch.compile(twin, backend=_whole_budget, fullgraph=True)

    @functools.wraps(forward)
    def compiled_forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or _is_watched():
            return forward(*args, **kwargs)
        with _no_global_hooks():
            return run(*args, **kwargs)

    return compiled_forward


def compiled_loss(model: nn.Module, loss_fn: LossFn) -> LossFn:
    """The loss function, the model's forward pass within, through ``torch.compile``.

    Models of one class and shapes share the code that was made for one loss function. Graph breaks are allowed:
    what is run is what is measured. Without gradients, and where another dispatch mode watches, the plain one runs.
    """
    code = getattr(loss_fn, "__code__", None) or type(loss_fn)
    run: Callable[..., Any] = torch.compile(
        _loss_twin(type(model), _shapes(model), code), backend=_whole_budget
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if not torch.is_grad_enabled() or _is_watched():
            return loss_fn(model, batch)
        with _no_global_hooks():
            return run(loss_fn, model, batch)

    return loss


def _whole_budget(graph: Any, inputs: Any) -> Any:
    """Inductor, its memory budget pinned: below 1 torch 2.13's gradients are wrong where there is dropout."""
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=1.0):
        return compile_fx(graph, inputs)


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    return tuple((n, tuple(t.shape), t.dtype, t.requires_grad, t.device.type) for n, t in tensors)


@functools.cache
def _twin(function: types.FunctionType, shapes: tuple[Any, ...]) -> types.FunctionType:  # pyright: ignore[reportUnusedParameter]
    """A function that calls ``function``, with a code object of its own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    code, names = forward.__code__.replace(), forward.__globals__
    return types.FunctionType(code, names, function.__name__, None, forward.__closure__)


@functools.cache
def _loss_twin(cls: type, shapes: tuple[Any, ...], code: object) -> types.FunctionType:  # pyright: ignore[reportUnusedParameter]
    """A function that calls a loss function, with a code object of its own."""

    def loss(loss_fn: LossFn, model: nn.Module, batch: Any) -> Any:
        return loss_fn(model, batch)

    return types.FunctionType(loss.__code__.replace(), loss.__globals__, "loss")


def _is_watched() -> bool:
    return any(not mode.ignore_compile_internals() for mode in _get_current_dispatch_mode_stack())


@contextmanager
def _no_global_hooks() -> Generator[None]:
    """Hooks on all modules (a ledger's) do not run inside: compiled code would be made again for them."""
    hooks = nn.modules.module
    tables = [hooks._global_forward_pre_hooks, hooks._global_forward_hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.update(before)


def unmark_later(module: nn.Module) -> Callable[[], None]:
    """An action that takes off the marks that torch.compile puts on parameters from now on."""
    mark = "_dynamo_static_input_type"
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not hasattr(t, mark)]

    def unmark() -> None:
        for tensor in tensors:
            vars(tensor).pop(mark, None)

    return unmark


def is_compile_error(error: BaseException) -> bool:
    """Whether ``error`` comes from torch.compile itself, not from the code that it compiled."""
    raised = [type(e) for e in (error, error.__cause__) if e is not None]
    rooms = ("torch._dynamo", "torch._inductor", "torch._functorch")
    return any(e.__module__.startswith(rooms) for e in raised) or "torch.compile" in str(error)


def first_line(error: BaseException) -> str:
    """The error's class and its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


_open: list[int] = []


@contextmanager
def visible_buffers() -> Generator[None]:
    """Compiled code makes its buffers through torch's dispatcher within the body, where a ledger sees them.

    Otherwise it calls an allocator of its own. The generated modules name that function; here the name means
    another one for a while.
    """
    _open.append(1)
    core: Any = torch._C
    source = core._dynamo.guards
    true = {name: getattr(source, f"_{name}", None) for name in _MAKERS}
    if len(_open) == 1:
        for name, device in _MAKERS.items():
            setattr(source, f"_{name}", _maker(device))
            _rebind(name, _maker(device))
    try:
        yield
    finally:
        _open.pop()
        if not _open:
            for name, function in true.items():
                setattr(source, f"_{name}", function)
                _rebind(name, function)


def _maker(device: str) -> Callable[..., Any]:
    def make(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return make


def _rebind(name: str, function: Any) -> None:
    cache: Any = sys.modules.get("torch._inductor.codecache")
    for module in cache.PyCodeCache.modules if cache is not None else ():
        if hasattr(module, name):
            setattr(module, name, function)
