"""Runs the loss, the model's forward pass within, and its backward as the fused kernels that torch.compile makes.

Formula: none; the same operations, with neighbours fused into one kernel over the borders of blocks too, up to the
    loss, so that what lies between them is never stored, and cheap ones run again in backward where that saves a
    tensor (a minimum cut decides which).
Memory: activations: what stays of the whole step is measured on a real one: 0.88 of plain's peak on a T5-like model,
    1.01 on a ViT. All gradients are complete at once, at the end, so updates during backward free little.
    Time: measured on real steps beside plain ones, in turns; compiling takes some 20 s to two minutes, once, and is
    shared over the steps of the run.
Exactness: exact. Sums are reassociated, so the bits differ. Dropout draws other masks than the plain step does: where
    random numbers are drawn the gradient is compared with a finite difference of the compiled loss before it is
    offered, else with the plain gradient.
Limits: refused where no C++ compiler is found, where compiling was not allowed or would not pay off, where a plain
    step does not fit into memory, on fake tensors, where torch.compile fails, and where the gradient differs. No
    other method is used on the model's blocks or loss beside it. A batch of another shape is compiled again.
    Without gradients the plain forward runs. A loss that is called in a loop of your own is not compiled.
References: Ansel et al., PyTorch 2, sections 3 (TorchDynamo) and 4 (TorchInductor); He and Yu, Transcending
    Runtime-Memory Tradeoffs in Checkpointing by being Fusion Aware (MLSys 2023), for the minimum cut.
    *departs:* activation_memory_budget pinned to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from slimgrad.errors import UnsupportedError
from slimgrad.host import Host
from slimgrad.measuring.compiled_code import (
    compiled_loss,
    cpp_compiler,
    first_line,
    is_compile_error,
    unmark_later,
)
from slimgrad.method import Block, Method, Offer, Paper, Refusal, Scope, Undo
from slimgrad.types import Column, Exactness, format_seconds


@dataclass(frozen=True)
class CompiledModel:
    """The step compiled as a whole; nothing to choose."""

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    compiles: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph Compilation",
        "Ansel et al.",
        2024,
        url="https://doi.org/10.1145/3620665.3640366",
    )

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """The one there is, where there is a compiler for it."""
        if host.device.type == "cpu" and cpp_compiler() is None:
            return Refusal("no C++ compiler is found (g++ or clang++)")
        return [cls()]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured step is compiled already; a step's share of compiling it is added to its seconds."""
        record = block.model_record
        once = f"{format_seconds(record.compile_s)} of compiling, over {record.num_steps} steps"
        made = replace(record, extra_s=record.extra_s + record.compile_s / record.num_steps)
        return Offer(made, f"the whole step compiled; {once}")

    def attach(self, block: Block) -> Undo:
        """Take the loss function's place in the step. Raises UnsupportedError without a C++ compiler."""
        host = block.live
        if host.device.type == "cpu" and cpp_compiler() is None:
            raise UnsupportedError(
                "the step is to be compiled, but no C++ compiler is found: install g++ or clang++, or plan again "
                "with allow_compile=False"
            )
        plain, run = host.loss_fn, compiled_loss(host.model, host.loss_fn)
        undo = Undo(unmark_later(host.model))

        @functools.wraps(run)
        def loss(model: nn.Module, batch: Any) -> Tensor:
            try:
                return run(model, batch)
            except Exception as error:
                if not is_compile_error(error):
                    raise
                raise UnsupportedError(
                    f"the step cannot be compiled for this batch ({first_line(error)}): plan again with "
                    "allow_compile=False"
                ) from error

        host.loss_fn = loss
        undo.then(lambda: setattr(host, "loss_fn", plain))
        return undo
