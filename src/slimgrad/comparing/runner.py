"""Runs the steps of one contender on its own copy of a model: a peer's or a plan's, on the device asked for."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.applying.step import apply
from slimgrad.batches import map_tensors
from slimgrad.comparing.peers import Peer
from slimgrad.comparing.zoo import Subject
from slimgrad.measuring.ledger import Ledger
from slimgrad.planning.plan import Plan
from slimgrad.training.resident import release_memory
from slimgrad.verifying.gradient import captured_gradients

SEED = 1234


class Runner(Protocol):
    """A contender at work."""

    model: nn.Module
    optimizer: Optimizer
    batch: Any
    foreign_bytes: int

    def step(self) -> None:
        """Forward, backward, update."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of a step from the copied weights, on the CPU, by parameter name."""
        ...

    def ledger(self) -> Ledger:
        """A ledger that knows this contender's tensors."""
        ...

    def park(self) -> None:
        """Leave the device until the next turn: weights to host memory, optimizer state dropped."""
        ...

    def resume(self) -> None:
        """Come back to the device."""
        ...

    def close(self) -> None:
        """Give up everything held."""
        ...


class _Copy:
    """A subject's model copied to a device, with its own optimizer and batch."""

    def __init__(self, subject: Subject, device: torch.device) -> None:
        self.device, self._make_optimizer = device, subject.optimizer
        self.foreign_bytes = _allocated(device)
        self.model = copy.deepcopy(subject.model).to(device)
        self.optimizer = subject.optimizer(self.model)
        self.batch = map_tensors(lambda t: t.to(device), subject.batch)
        torch.manual_seed(SEED)

    def park(self) -> None:
        self.optimizer.state.clear()
        self.model.to("cpu")

    def resume(self) -> None:
        self.foreign_bytes = _allocated(self.device)
        self.model.to(self.device)
        self.optimizer = self._make_optimizer(self.model)
        torch.manual_seed(SEED)

    def _gradients(self) -> dict[str, Tensor]:
        named = self.model.named_parameters()
        return {n: p.grad.detach().clone().cpu() for n, p in named if p.grad is not None}


class PeerRunner(_Copy):
    """Plain training, or a peer's."""

    def __init__(self, peer: Peer, subject: Subject, device: torch.device) -> None:
        super().__init__(subject, device)
        self.peer = peer
        self._undo = peer.attach(self.model, subject)
        self.loss_fn = peer.loss_fn(subject)

    def step(self) -> None:
        """Forward, backward, update."""
        self._backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Those of a forward and backward pass; nothing is updated."""
        self._backward()
        found = self._gradients()
        self.optimizer.zero_grad()
        return found

    def _backward(self) -> None:
        with self.peer.saving(self.model):
            loss = self.loss_fn(self.model, self.batch)
            loss.backward()

    def ledger(self) -> Ledger:
        """A ledger over model, optimizer and batch."""
        return Ledger(self.model, self.optimizer, inputs=self.batch)

    def close(self) -> None:
        """Take the checkpoints off."""
        self._undo()


class SlimRunner(_Copy):
    """A plan of slimgrad's, applied."""

    def __init__(self, plan: Plan, subject: Subject, device: torch.device) -> None:
        super().__init__(subject, device)
        self.applied = apply(plan, self.model, self.optimizer, subject.loss_fn)

    def step(self) -> None:
        """One planned step."""
        self.applied(self.batch)

    def gradients(self) -> dict[str, Tensor]:
        """Each as it completes in one planned step, which updates as it goes."""
        found: dict[str, Tensor] = {}
        with captured_gradients(self.model, found):
            self.applied(self.batch)
        return {name: gradient.cpu() for name, gradient in found.items()}

    def ledger(self) -> Ledger:
        """The step's own ledger, staging buffers named."""
        return self.applied.ledger(self.batch)

    def close(self) -> None:
        """Undo the plan."""
        self.applied.undo()


def _allocated(device: torch.device) -> int:
    """What others hold on the device, once nothing is left that only cycles keep, and what is free is given back.

    A contender that found its places in what another left free would fault fewer pages.
    """
    release_memory()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
