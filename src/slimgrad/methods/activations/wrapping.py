"""Runs the forward pass of a module through a method, on the instance, until it is undone."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slimgrad.method import Undo


def wrap_forward(
    module: nn.Module, run: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
) -> Undo:
    """Where gradients are recorded, ``module(*args)`` becomes ``run(forward, args, kwargs)``."""
    own = module.__dict__.get("forward")
    plain: Callable[..., Any] = type(module).forward

    @functools.wraps(plain)
    def forward(self_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inner = own if own is not None else functools.partial(plain, self_)
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        return run(inner, args, kwargs)

    # a method of the module, so that a deep copy of the module calls itself
    module.__dict__["forward"] = types.MethodType(forward, module)

    def restore() -> None:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own

    return Undo(restore)
