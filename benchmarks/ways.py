"""One way to run a forward and backward pass: its bytes by column and its seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad


@dataclass
class Way:
    """One way to run the pass; ``model`` and ``inputs`` give the ledger's columns their names."""

    name: str
    run: Callable[[], object]
    model: nn.Module
    inputs: Any = ()
    times_s: list[float] = field(default_factory=list)

    def columns(self) -> dict[str, int]:
        self.run()
        self.clear()
        with slimgrad.Ledger(self.model, inputs=self.inputs) as ledger:
            self.run()
        self.clear()
        return {"peak": ledger.peak_bytes} | {c.value: b for c, b in ledger.columns.items()}

    def turn(self) -> None:
        begin = time.perf_counter()
        self.run()
        self.times_s.append(time.perf_counter() - begin)
        self.clear()

    def clear(self) -> None:
        for tensor in (*self.model.parameters(), *tensors(self.inputs)):
            tensor.grad = None


def tensors(tree: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
