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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slimgrad.measuring.randomness import OutsideTorch
from slimgrad.measuring.second_run import SecondRun
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


class _Replay(SecondRun):
    """A second run by ``torch.utils.checkpoint``: Python's and NumPy's random states too are those of the first."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.random = OutsideTorch.now()

    def contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """What it enters in the first and in the second run."""
        return self.observing(), self._second_run()

    @contextmanager
    def _second_run(self) -> Generator[None]:
        random = OutsideTorch.now()
        try:
            with self.again():
                self.random.restore()
                yield
        finally:
            random.restore()
