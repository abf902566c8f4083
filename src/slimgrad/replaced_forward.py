"""Another forward pass for modules, on the instances, until it is undone."""

from __future__ import annotations

import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.method import Undo


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Undo:
    """``module(*args)`` becomes ``forward(module, *args)``, on deep copies of it too; names and hooks stay.

    Raises UnsupportedError where something has changed the forward pass of this instance already.
    """
    if "forward" in module.__dict__:
        raise UnsupportedError(
            f"expected a {type(module).__name__} with the forward pass of its class, found one that was replaced: "
            "undo what was done to it first"
        )
    module.__dict__["forward"] = types.MethodType(forward, module)
    return Undo(lambda: module.__dict__.pop("forward"))


def layers_named(layers: Collection[str] | None, everyone: Collection[str]) -> Collection[str]:
    """The paths that a user named, ``everyone``'s for None. Raises MethodError for a single string."""
    if isinstance(layers, str):
        raise MethodError(f"expected a list of paths for layers, found the string {layers!r}")
    return everyone if layers is None else layers
