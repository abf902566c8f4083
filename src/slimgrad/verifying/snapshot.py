"""Everything of the user's that a trial step may change, copied and put back: nothing is left of a verification."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.measuring.buffers import Buffers
from slimgrad.measuring.randomness import RandomState


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Snapshot:
    """Parameters, buffers, gradients, optimizer state and groups, and every random state.

    Taken and restored while the optimizer's state is in memory (no plan attached).
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self.model, self.optimizer = model, optimizer
        self.random = RandomState.now()
        self.values = [(p, p.detach().clone()) for p in model.parameters()]
        self.buffers = Buffers.of(model)
        self.gradients = [(p, p.grad) for p in model.parameters()]
        self.modes = [(m, m.training) for m in model.modules()]
        self.state: list[tuple[Tensor, dict[str, Any]]] = []
        self.groups: list[dict[str, Any]] = []
        if optimizer is not None:
            self.state = [
                (p, {k: _copied(v) for k, v in s.items()}) for p, s in optimizer.state.items()
            ]
            self.groups = [
                {k: _copied(v) for k, v in g.items() if k != "params"}
                for g in optimizer.param_groups
            ]

    def restore(self) -> None:
        """Put everything back, in the user's own tensors and dictionaries."""
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        self.buffers.restore()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for module, mode in self.modes:
            module.training = mode
        if self.optimizer is not None:
            self.optimizer.state.clear()
            for parameter, state in self.state:
                self.optimizer.state[parameter] = {k: _copied(v) for k, v in state.items()}
            for group, values in zip(self.optimizer.param_groups, self.groups, strict=True):
                group.update({k: _copied(v) for k, v in values.items()})
        self.random.restore()

    def moved(self) -> dict[int, Tensor]:
        """How far each parameter is from where it was, by ``id``."""
        return {id(t): t.detach() - v for t, v in self.values}

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        held = [v for _, v in self.values] + [v for _, _, _, v in self.buffers.places]
        held += [v for _, s in self.state for v in s.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)
