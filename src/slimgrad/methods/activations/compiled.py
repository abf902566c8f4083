"""Runs a block's forward and backward as fused kernels that torch.compile makes from its operations.

Formula: none; the same operations, with neighbours fused into one kernel, so that what lies between them is never
    stored, and cheap ones run again in backward where that saves a tensor (a minimum cut decides which).
Memory: activations: what the compiled block saves was measured on the real block; on a GPT-2 block it is about
    half, on a block of few fused layers and flash attention nothing less. With recompute only the block's inputs
    stay, and the compiled forward runs again.
    Time: measured beside the plain block; compiling takes 10-40 s for each set of blocks that are alike, once, and
    is shared over the steps of the run.
Exactness: exact. Sums are reassociated, so the bits differ. Dropout draws other masks than the plain block does:
    where a block draws random numbers its gradient is compared with a finite difference before it is offered, else
    with the plain block's (torch 2.13 is wrong for a block that counts its calls in a buffer and divides by it).
Limits: refused where no C++ compiler is found, where compiling was not allowed or would not pay off, where the
    block cannot be compiled as one graph, where its gradients differ, and where nothing is gained. A batch of
    another shape is compiled again. Without gradients the plain forward runs.
References: Ansel et al., PyTorch 2, sections 3 (TorchDynamo) and 4 (TorchInductor); He and Yu, Transcending
    Runtime-Memory Tradeoffs in Checkpointing by being Fusion Aware (MLSys 2023), for the minimum cut.
    *departs:* one block at a time, activation_memory_budget pinned to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from slimgrad.errors import UnsupportedError
from slimgrad.measuring.compiled_code import (
    compiled,
    cpp_compiler,
    first_line,
    is_compile_error,
    unmark_later,
)
from slimgrad.method import (
    Block,
    CompiledCost,
    Method,
    Offer,
    Paper,
    Record,
    Refusal,
    Restore,
    Scope,
    Undo,
)
from slimgrad.methods.activations.recompute import Recompute
from slimgrad.types import Column, Exactness, format_bytes, format_seconds

_LEAST_GAIN = 0.02  # of bytes or seconds: less is noise


@dataclass(frozen=True)
class Compiled:
    """``recompute``: keep only the block's inputs, and run the compiled forward again before backward."""

    recompute: bool = False

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.BLOCK
    compiles: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation",
        "Ansel et al.",
        2024,
        url="https://doi.org/10.1145/3620665.3640366",
    )

    @classmethod
    def grades(cls, block: Block) -> Sequence[Method]:
        """Compiled, and compiled with recomputation."""
        return [cls(), cls(recompute=True)]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured bytes, and the plain seconds times the measured ratio."""
        record, cost = block.measured, block.measured.compiled
        if cost is None:
            return Refusal("what the block takes when compiled was not measured")
        if record.restore is not Restore.NONE:
            return Refusal("what the block saves already comes back in another way")
        made = _as_compiled(record, cost)
        saves = 1 - made.saved_bytes / max(record.saved_bytes, 1)
        faster = 1 - (made.forward_s + made.backward_s) / max(
            record.forward_s + record.backward_s, 1e-12
        )
        if not self.recompute and max(saves, faster) < _LEAST_GAIN:
            return Refusal("the compiled block saves as much and takes as long as the plain one")
        once = f"{format_seconds(cost.compile_s)} of compiling for {cost.num_sharing} block(s), over {record.num_steps} steps"
        if not self.recompute:
            return Offer(made, f"{format_bytes(made.saved_bytes)} saved; {once}")
        again = replace(
            made, held_bytes=0, restore=Restore.REPLAY, restore_s=made.forward_s, holds_inputs=True
        )
        return Offer(again, f"{format_bytes(made.saved_bytes)} recomputed; {once}")

    def attach(self, block: Block) -> Undo:
        """Replace the block's ``forward`` on the instance. Raises UnsupportedError without a C++ compiler."""
        if block.live.device.type == "cpu" and cpp_compiler() is None:
            raise UnsupportedError(
                f"block {block.path!r} is to be compiled, but no C++ compiler is found: install g++ or clang++, or "
                "plan again with allow_compile=False"
            )
        module = block.live.model.get_submodule(block.path)
        run, undo = compiled(module), Undo(unmark_later(module))

        @functools.wraps(run)
        def named(*args: Any, **kwargs: Any) -> Any:
            try:
                return run(*args, **kwargs)
            except Exception as error:
                if not is_compile_error(error):
                    raise
                raise UnsupportedError(
                    f"block {block.path!r} cannot be compiled for this batch ({first_line(error)}): plan again "
                    "with allow_compile=False"
                ) from error

        module.forward = named  # pyright: ignore[reportAttributeAccessIssue]
        undo.then(lambda: module.__dict__.pop("forward", None))
        if self.recompute:
            undo.then(Recompute().attach(block))
        return undo


def _as_compiled(record: Record, cost: CompiledCost) -> Record:
    """The record of the block when it is compiled; seconds are the plain ones times the measured ratios."""
    calls = max(1, round(record.saved_bytes / max(cost.plain_saved_bytes, 1)))
    saved = cost.saved_bytes * calls
    return replace(
        record,
        saved_bytes=saved,
        held_bytes=saved,
        forward_s=record.forward_s * cost.forward_s / max(cost.plain_forward_s, 1e-9),
        backward_s=record.backward_s * cost.backward_s / max(cost.plain_backward_s, 1e-9),
        holds_inputs=cost.holds_inputs,
        is_compiled=True,
        once_s=cost.compile_s / cost.num_sharing,
        graph=None,
    )
