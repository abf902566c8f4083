"""A linear module's ``forward`` that returns deferred logits, put on the module's instance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from slimgrad.methods.loss.deferred_logits import DeferredLogits, defer
from slimgrad.methods.loss.linear_cross_entropy import Backend
from slimgrad.methods.loss.pending_logits import Outcome

_KEPT_OUTCOMES = 64
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    """Whether ``module`` computes exactly ``nn.Linear.forward``, by its class and on its instance."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
    )


def outcomes(head: nn.Module) -> tuple[Outcome, ...]:
    """What became of the logits of ``head``'s last calls (at most 64), oldest first; empty if it is not deferring."""
    forward = vars(head).get("forward")
    return tuple(forward.outcomes) if isinstance(forward, DeferringForward) else ()


class DeferringForward:
    """``forward`` of one linear head; ``outcomes`` tells what became of its last calls."""

    def __init__(self, head: nn.Linear, chunk_size: int, backend: Backend) -> None:
        self.head = head
        self.chunk_size = chunk_size
        self.backend: Backend = backend
        self.is_active = True
        self.outcomes: deque[Outcome] = deque(maxlen=_KEPT_OUTCOMES)

    @classmethod
    def install(cls, head: nn.Linear, chunk_size: int, backend: Backend) -> Callable[[], None]:
        """Put one on ``head``; returns what takes it off again."""
        forward = cls(head, chunk_size, backend)
        vars(head)["forward"] = forward

        def remove() -> None:
            forward.is_active = False  # somebody may have wrapped it since
            if vars(head).get("forward") is forward:
                del vars(head)["forward"]

        return remove

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002 - the name is nn.Linear's
        """The head's output, deferred where nothing speaks against it."""
        head = self.head
        if isinstance(input, DeferredLogits):  # another head's output is this one's input
            input = input.pending.materialise("nn.Linear.forward")  # noqa: A001
        reason = "undone" if not self.is_active else _why_plain(head, input)
        if reason is not None:
            if self.is_active:
                self.outcomes.append(Outcome((), materialised_by=reason))
            return type(head).forward(head, input)
        outcome = Outcome((*input.shape[:-1], head.weight.shape[0]))
        self.outcomes.append(outcome)
        return defer(
            input,
            head.weight,
            head.bias,
            chunk_size=self.chunk_size,
            backend=self.backend,
            outcome=outcome,
        )


def _why_plain(head: nn.Linear, hidden: Any) -> str | None:
    """What keeps this call from being deferred, or None. An error in the operands is left to torch to tell."""
    weight, bias = head.weight, head.bias
    operands = [t for t in (hidden, weight, bias) if t is not None]
    if not all(type(t) in _PLAIN_TENSORS for t in operands):
        return "an operand that is no plain tensor"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "compilation"
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        return "torch.func"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if head._backward_hooks or head._backward_pre_hooks or _has_global_backward_hooks():
        return "backward hooks on the head"
    is_one_place = len({(t.device, t.layout) for t in operands}) == 1
    fits = hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[-1] and weight.dim() == 2
    casts = torch.is_autocast_enabled(hidden.device.type)
    is_one_dtype = len({t.dtype for t in operands}) == 1
    if casts:
        is_one_dtype = is_one_dtype or all(t.dtype != torch.float64 for t in operands)
    if not (is_one_place and fits and is_one_dtype and weight.is_floating_point()):
        return "operands that linear cannot take, or not as they are"
    return None


def _has_global_backward_hooks() -> bool:
    return bool(torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
