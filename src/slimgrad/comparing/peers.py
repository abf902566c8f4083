"""The peers: other ways to train in less memory, by name, each set up as its own documentation shows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.comparing.saved_file import saved_outside
from slimgrad.comparing.segments import (
    ContextFn,
    attach_checkpoints,
    every_block,
    every_second_block,
    noop_context_fn,
    root_segments,
    saving_products,
)
from slimgrad.comparing.zoo import Subject
from slimgrad.errors import MethodError
from slimgrad.method import Undo

Segments = Callable[[Sequence[Sequence[str]]], list[list[str]]]
LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Peer:
    """One way to train.

    ``segments`` says which blocks are under checkpoints; ``offloads`` puts saved tensors outside the device;
    ``compile_budget`` compiles the loss function with that ``activation_memory_budget`` (1 is PyTorch's own).
    """

    name: str
    title: str
    segments: Segments | None = None
    context_fn: ContextFn = noop_context_fn
    offloads: bool = False
    compile_budget: float | None = None

    @property
    def compiled(self) -> bool:
        """Whether the step is compiled."""
        return self.compile_budget is not None

    def attach(self, model: nn.Module, subject: Subject) -> Undo:
        """Put the checkpoints on a copy of the subject's model."""
        if self.segments is None:
            return Undo()
        return attach_checkpoints(model, self.segments(subject.chains), self.context_fn)

    def loss_fn(self, subject: Subject) -> LossFn:
        """The subject's loss function, compiled where this peer compiles."""
        if self.compile_budget is None:
            return subject.loss_fn
        return torch.compile(subject.loss_fn, backend=_inductor(self.compile_budget))

    @contextmanager
    def saving(self, model: nn.Module) -> Generator[None]:
        """Forward and backward run within this."""
        with saved_outside(model) if self.offloads else nullcontext():
            yield


def _inductor(budget: float) -> Callable[[Any, Any], Any]:
    """PyTorch's default backend under an activation memory budget.

    A function of its own each time: compiled code is kept by backend, so that no peer runs another's.
    """

    def backend(module: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(activation_memory_budget=budget):
            return compile_fx(module, inputs)

    return backend


PLAIN = Peer("plain", "plain")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("checkpoint", "checkpoint, every block", every_block),
        Peer("checkpoint-half", "checkpoint, every second block", every_second_block),
        Peer("checkpoint-sqrt", "checkpoint, sqrt(n) segments", root_segments),
        Peer("selective", "selective checkpoint, products saved", every_block, saving_products),
        Peer("offload", "saved tensors outside the device", offloads=True),
        Peer("compile", "torch.compile", compile_budget=1.0),
        Peer("compile-checkpoint", "torch.compile + checkpoint", every_block, compile_budget=1.0),
        Peer("compile-0.75", "torch.compile, budget 0.75", compile_budget=0.75),
        Peer("compile-0.5", "torch.compile, budget 0.5", compile_budget=0.5),
        Peer("compile-0.25", "torch.compile, budget 0.25", compile_budget=0.25),
    )
}


def chosen_peers(names: Sequence[str] | None = None, *, compiled: bool = True) -> list[Peer]:
    """The peers of those names (None: all), without those that compile unless ``compiled``.

    Raises ``MethodError`` for a name that is not known.
    """
    for name in names or ():
        if name not in PEERS:
            near = difflib.get_close_matches(name, PEERS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise MethodError(f"no peer {name!r}: {hint}Expected some of {', '.join(PEERS)}")
    wanted = [PEERS[name] for name in (PEERS if names is None else names)]
    return [peer for peer in wanted if compiled or not peer.compiled]
