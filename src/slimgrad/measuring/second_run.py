"""What the second run of a module must see again, and whom it must not call: its buffers, and forward hooks that only look."""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class SecondRun:
    """The buffers that a module's forward pass changes, and the hooks inside it.

    A hook that returned nothing in the first run is not called in the second one.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.changed: list[tuple[nn.Module, str, Tensor]] = []
        self.silent: set[int] = set()

    @contextmanager
    def first_run(self, changing: set[str] | None) -> Generator[None]:
        """Note the buffers that the forward pass changes (all are watched until that is known).

        Values are compared once: batch norm's kernel writes its statistics without raising their version.
        """
        before = [
            (owner, name, buffer, buffer._version, buffer.detach().clone())
            for owner in self.module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None and (changing is None or f"{id(owner)}.{name}" in changing)
        ]
        yield
        for owner, name, buffer, version, value in before:
            written = owner._buffers.get(name) is not buffer or buffer._version != version
            if changing is not None or written or not torch.equal(buffer, value):
                self.changed.append((owner, name, value))

    def observing(self) -> AbstractContextManager[Any]:
        """For the first run: which hooks only look."""
        return (
            _hooks_replaced(self.module, self._watched)
            if _has_hooks(self.module)
            else nullcontext()
        )

    @contextmanager
    def again(self) -> Generator[None]:
        """For the second run: buffers as the first run saw them, and afterwards as they are now."""
        now = [(owner, name, owner._buffers[name]) for owner, name, _ in self.changed]
        for owner, name, value in self.changed:
            owner._buffers[name] = value.clone()
        quiet = _hooks_replaced(self.module, self._silenced) if self.silent else nullcontext()
        try:
            with quiet:
                yield
        finally:
            for owner, name, buffer in now:
                owner._buffers[name] = buffer

    def _watched(self, hook: Any) -> Any:
        @functools.wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            out = hook(*args, **kwargs)
            if out is None:
                self.silent.add(id(hook))
            return out

        return watched

    def _silenced(self, hook: Any) -> Any:
        return (lambda *_args, **_kwargs: None) if id(hook) in self.silent else hook


def _has_hooks(module: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks for m in module.modules() if m is not module
    )


@contextmanager
def _hooks_replaced(module: nn.Module, by: Any) -> Generator[None]:
    """Every forward hook of the modules inside ``module`` replaced by ``by(hook)``."""
    tables = [
        table
        for inner in module.modules()
        if inner is not module
        for table in (inner._forward_hooks, inner._forward_pre_hooks)
        if table
    ]
    kept = [dict(table) for table in tables]
    try:
        for table in tables:
            for key, hook in list(table.items()):
                table[key] = by(hook)
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            for key, hook in hooks.items():
                if key in table:
                    table[key] = hook
