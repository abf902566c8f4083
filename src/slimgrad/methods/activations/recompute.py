"""Drops what a block saves for backward and runs its forward pass again when backward needs it.

Formula: none; the block's forward is evaluated twice on the same inputs, random states and buffers.
Memory: the block's saved tensors are replaced by its inputs; they come back one block at a time during backward.
    Over n equal blocks activations fall from n a to n i + a, with i a block's input and a what it saves.
    Time: one more forward pass of the block, up to the last tensor that backward needs.
Exactness: bitwise. Random states (torch's on every device, Python's, NumPy's) and autocast are those of the
    first run; buffers that the forward pass changes are put back to what it saw, and afterwards to what they
    were, so batch norm counts once. A forward that depends on anything else that changes is caught by verify.
Limits: refused for blocks that save nothing. Forward hooks on the block itself run once; those on modules
    inside it run again where they return a value, and once where they only look.
References: Chen et al., Training Deep Nets with Sublinear Memory Cost, algorithm 1, with one segment a block.
    *departs:* which blocks are recomputed is chosen by the planner; torch.utils.checkpoint (non-reentrant) does
    the work.
"""

from __future__ import annotations

import functools
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimgrad.measuring.randomness import OutsideTorch
from slimgrad.method import Block, Offer, Paper, Record, Refusal, Restore, Scope, Undo
from slimgrad.types import Column, Exactness, format_bytes


@dataclass(frozen=True)
class Recompute:
    """No hyperparameters."""

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.BITWISE
    scope: ClassVar[Scope] = Scope.BLOCK
    paper: ClassVar[Paper] = Paper(
        "Training Deep Nets with Sublinear Memory Cost", "Chen et al.", 2016, "1604.06174"
    )

    def offer(self, block: Block) -> Offer | Refusal:
        """Nothing held but the inputs; the forward pass again before backward."""
        record: Record = block.measured
        if not record.saved_bytes:
            return Refusal("the block saves nothing for backward")
        if record.restore is not Restore.NONE:
            return Refusal("what the block saves already comes back in another way")
        return Offer(
            replace(
                record,
                held_bytes=0,
                restore=Restore.REPLAY,
                restore_s=record.forward_s,
                holds_inputs=True,
            ),
            f"{format_bytes(record.saved_bytes)} recomputed",
        )

    def attach(self, block: Block) -> Undo:
        """Wrap the block's ``forward`` on the instance."""
        module = block.live.model.get_submodule(block.path)
        forward = module.forward
        # buffers that the forward pass changes, by the modes of the modules, once known
        known: dict[tuple[bool, ...], set[str]] = {}

        @functools.wraps(forward)
        def recomputed(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            modes = tuple(m.training for m in module.modules())
            replay = _Replay(module)
            with replay.first_run(known.get(modes)):
                out = checkpoint(
                    forward, *args, use_reentrant=False, context_fn=replay.contexts, **kwargs
                )
            known[modes] = {f"{id(owner)}.{name}" for owner, name, _ in replay.changed}
            return out

        module.forward = recomputed  # pyright: ignore[reportAttributeAccessIssue]
        return Undo(lambda: module.__dict__.pop("forward", None))


class _Replay:
    """What the second run must see again: buffers, Python's and NumPy's random state; and whom it must not call."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.random = OutsideTorch.now()
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

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What ``torch.utils.checkpoint`` enters in the first and in the second run."""
        return self._observing(), self._second_run()

    def _observing(self) -> AbstractContextManager[Any]:
        return (
            _hooks_replaced(self.module, self._watched)
            if _has_hooks(self.module)
            else nullcontext()
        )

    @contextmanager
    def _second_run(self) -> Generator[None]:
        random = OutsideTorch.now()
        now = [(owner, name, owner._buffers[name]) for owner, name, _ in self.changed]
        for owner, name, value in self.changed:
            owner._buffers[name] = value.clone()
        quiet = _hooks_replaced(self.module, self._silenced) if self.silent else nullcontext()
        try:
            with quiet:
                self.random.restore()
                yield
        finally:
            for owner, name, buffer in now:
                owner._buffers[name] = buffer
            random.restore()

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
