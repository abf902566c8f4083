"""Compares one step's gradients, updates, buffers and random states by value."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from slimgrad.batches import map_tensors
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.tracker import before_other_gradient_hooks


@dataclass
class Outcome:
    """What one trial step left behind. Gradients and moves by parameter name, buffers by buffer name."""

    loss: float
    gradients: dict[str, Tensor]
    moves: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    random: RandomState | None = None


def relative_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all entries together, in float64. Names must agree.

    Entry by entry would mislead: a true gradient of zero is only rounding noise.

    >>> import torch
    >>> relative_error({"w": torch.tensor([3.0, 4.5])}, {"w": torch.tensor([3.0, 4.0])})
    0.1
    """
    if set(ours) != set(theirs):
        return float("inf")
    difference, size = 0.0, 0.0
    for name, reference in theirs.items():
        wide = reference.double()
        difference += float((ours[name].double() - wide).square().sum())
        size += float(wide.square().sum())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return (difference / size) ** 0.5


def same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether every tensor is equal, bit for bit (NaN equal to NaN)."""
    return set(ours) == set(theirs) and all(
        torch.equal(ours[n].nan_to_num(nan=1.25), theirs[n].nan_to_num(nan=1.25)) for n in theirs
    )


@contextmanager
def captured_gradients(model: nn.Module, into: dict[str, Tensor]) -> Generator[None]:
    """Keep a copy of every gradient as it completes, before anybody else uses or frees it."""
    handles: list[Any] = []

    def keep(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                into[name] = parameter.grad.detach().clone()

        return hook

    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_leaf:
            handles.append(before_other_gradient_hooks(parameter, keep(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_dropout(model: nn.Module) -> Generator[None]:
    """Every module but batch norm in evaluation mode, so that no random mask is drawn."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    changed = [m for m in model.modules() if m.training and not isinstance(m, norms)]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


def _is_lower(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value in (
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )


def _run_backward(loss: Tensor) -> None:
    """``loss.backward()`` past torch's function modes, so that one can stay on inside it."""
    torch.autograd.graph._engine_run_backward(
        (loss,),
        (torch.ones_like(loss),),
        False,  # the graph is not kept
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


class _KeepWide(TorchFunctionMode):
    """Casts to lower precision inside the user's code (a loss taken in float32) go to float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` with every lower floating dtype replaced."""
        if func is Tensor.backward and not any((kwargs or {}).values()):
            with self:  # a mode is off inside itself, but backward may run the model again
                return _run_backward(args[0])
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        args = tuple(torch.float64 if _is_lower(a) else a for a in args)
        kwargs = {k: torch.float64 if _is_lower(v) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextmanager
def in_float64(model: nn.Module) -> Generator[None]:
    """The model's floating parameters and buffers in float64 within the body; the same tensors afterwards.

    Casts to lower precision within the body are to float64 as well: a loss that a library takes in float32
    carries that precision's error (log-softmax over a large vocabulary: 1e-4 of the gradient).
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dtype != torch.float64:
                kept.append((tensor, tensor.data))
                tensor.data = tensor.data.double()
        with _KeepWide():
            yield
    finally:
        for tensor, data in kept:
            tensor.grad = None
            tensor.data = data


def widened(batch: Any) -> Any:
    """The batch with its floating tensors in float64."""
    return map_tensors(lambda t: t.double() if t.is_floating_point() else t, batch)
