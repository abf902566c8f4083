"""Training as users write it, and everything of theirs that a step may change, read out and compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.measuring.randomness import RandomState


def plain_step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    clip_grad_norm: float | None = None,
) -> Tensor:
    """Zero, forward, backward, clip, update, zero: one plain step; the detached loss."""
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    if clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@dataclass
class State:
    """Parameters, buffers, gradients, optimizer state and groups, modes and every random state, copied."""

    tensors: dict[str, Tensor | None]
    optimizer: Any
    random: RandomState
    modes: dict[str, bool]

    @staticmethod
    def of(model: nn.Module, optimizer: Optimizer | None) -> State:
        tensors: dict[str, Tensor | None] = {
            f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()
        }
        tensors |= {f"buffer {n}": b.detach().clone() for n, b in model.named_buffers()}
        tensors |= {
            f"gradient {n}": None if p.grad is None else p.grad.clone()
            for n, p in model.named_parameters()
        }
        held = None if optimizer is None else _copied(optimizer.state_dict())
        modes = {n: m.training for n, m in model.named_modules()}
        return State(tensors, held, RandomState.now(), modes)

    def differences(self, other: State) -> list[str]:
        """What differs, by name; empty where every bit is the same."""
        names = self.tensors.keys() ^ other.tensors.keys()
        found = [f"only one has {name}" for name in sorted(names)]
        found += [
            name
            for name in self.tensors.keys() & other.tensors.keys()
            if not same(self.tensors[name], other.tensors[name])
        ]
        if not same(self.optimizer, other.optimizer):
            found.append("optimizer state")
        if not self.random.same_as(other.random):
            found.append("random state")
        if self.modes != other.modes:
            found.append("training modes")
        return sorted(found)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nests of tensors and values are equal: kinds, dtypes, strides and bits."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and torch.equal(ours.nan_to_num(nan=1.25), theirs.nan_to_num(nan=1.25))
        )
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def instance_attributes(model: nn.Module) -> dict[str, set[str]]:
    """What each module holds in its own ``__dict__``, hooks by number: nothing may be left there by an undo."""
    return {
        path: {name for name in vars(module) if not name.startswith("_")}
        | {
            f"{name}: {len(table)}"
            for name, table in vars(module).items()
            if "hooks" in name and isinstance(table, dict)
        }
        for path, module in model.named_modules()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value)
    return value
