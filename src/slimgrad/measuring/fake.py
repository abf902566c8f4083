"""The user's model with fake tensors in place of its own: shapes and lifetimes of a step, and no memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from slimgrad.batches import map_tensors
from slimgrad.measuring.randomness import kept_randomness


@contextmanager
def faked(model: nn.Module, *batches: Any) -> Generator[list[Any]]:
    """Run the body with ``model``'s parameters and buffers swapped for fakes; yields the fake batches.

    Module objects stay the same, so closures, hooks and patched forwards see what they always see. Everything
    is put back at the end: tensors, and the random state.
    """
    theirs = next((t for t in model.parameters() if isinstance(t, FakeTensor)), None)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if theirs is None else theirs.fake_mode
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    memo: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in memo:
            gradient, tensor.grad = tensor.grad if tensor.is_leaf else None, None
            try:
                memo[id(tensor)] = mode.from_tensor(tensor)
            finally:
                if gradient is not None:
                    tensor.grad = gradient
        return memo[id(tensor)]

    try:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in list(table.items()):
                    if tensor is not None:
                        swapped.append((table, name, tensor))
                        _assign(module, table, name, fake(tensor))
        fakes = [map_tensors(fake, batch) for batch in batches]
        with kept_randomness(), mode:
            yield fakes
    finally:
        owners = {id(t): m for m in model.modules() for t in (m._parameters, m._buffers)}
        for table, name, tensor in swapped:
            _assign(owners[id(table)], table, name, tensor)


def _assign(module: nn.Module, table: dict[str, Any], name: str, tensor: Tensor) -> None:
    table[name] = tensor
    if isinstance(module, nn.RNNBase):  # keeps its weights a second time, in a list
        setattr(module, name, tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory behind it."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
