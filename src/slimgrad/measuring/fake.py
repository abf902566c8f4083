"""The user's model with fake tensors in place of its own: shapes and lifetimes of a step, and no memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimgrad.batches import map_tensors
from slimgrad.measuring.randomness import kept_randomness

_MOST_BYTES = 2**26  # integers larger than that are faked as well


@contextmanager
def faked(model: nn.Module, *batches: Any) -> Generator[list[Any]]:
    """Run the body with ``model``'s parameters and buffers swapped for fakes; yields the fake batches.

    Integers and booleans are copied instead, small as they are: models look at the values of masks and positions
    and take other ways for them. Module objects stay the same, so closures, hooks and patched forwards see what they always see. Everything
    is put back at the end: tensors, and the random state.
    """
    theirs = next((t for t in model.parameters() if isinstance(t, FakeTensor)), None)
    mode = FakeTensorMode(allow_non_fake_inputs=True) if theirs is None else theirs.fake_mode
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    memo: dict[int, Tensor] = {}
    storages: dict[int, torch.UntypedStorage] = {}

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in memo and _is_small_and_whole(tensor):
            memo[id(tensor)] = _copied(tensor, storages)
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
        with kept_randomness(), mode, _WholeNumbers():
            yield fakes
    finally:
        owners = {id(t): m for m in model.modules() for t in (m._parameters, m._buffers)}
        for table, name, tensor in swapped:
            _assign(owners[id(table)], table, name, tensor)


def _is_small_and_whole(tensor: Tensor) -> bool:
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return (
        whole
        and tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() <= _MOST_BYTES
    )


def _copied(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy with the same strides; tensors that share a storage share its copy."""
    storage = tensor.untyped_storage()
    copy = storages.setdefault(storage._cdata, storage.clone())
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(copy, tensor.storage_offset(), tensor.shape, tensor.stride())


class _WholeNumbers(TorchDispatchMode):
    """Runs what is computed from whole numbers alone for real, so that it has values to be looked at."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(a, FakeTensor) for a in args):  # most operations by far
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) or not _is_small_and_whole(t) for t in tensors):
            return func(*args, **kwargs)
        if not func._schema.is_mutable:
            try:
                out = func(*args, **kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                out = None  # only the values tell
            made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
            if not all(_is_small_and_whole(t) for t in made):
                return out
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _assign(module: nn.Module, table: dict[str, Any], name: str, tensor: Tensor) -> None:
    table[name] = tensor
    if isinstance(module, nn.RNNBase):  # keeps its weights a second time, in a list
        setattr(module, name, tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no memory behind it."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
