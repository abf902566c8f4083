"""What a method may touch while it is attached: the user's objects, and the places of a step it may take over.

A step runs like this (``applying/step.py``)::

    for share in host.split(batch):                 # one share, unless micro-batches are used
        loss = loss_fn(model, share.batch)
        (loss * share.weight).backward()            # host.on_gradient(parameter) as each gradient completes
    host.finish()                                   # clipping, the updates still owed, optimizer.step()

A method takes over a place by assigning to it in ``attach`` and assigning the old value back in its undo.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from slimgrad.code import PlacedCode
from slimgrad.optimizers import plain_step, step_parameter
from slimgrad.types import Column

Batch: TypeAlias = Any
LossFn: TypeAlias = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Share:
    """A part of a batch and the weight of its loss: the weighted losses of all shares sum to the batch's loss."""

    batch: Batch
    weight: float = 1.0


def whole(batch: Batch) -> Sequence[Share]:
    """The batch as one share."""
    return (Share(batch),)


class Host:
    """The user's model, optimizer and loss function while a plan is applied.

    Places a method may take over:

    - ``split(batch) -> shares``
    - ``loss_fn(model, batch) -> loss``: the forward pass of one share.
    - ``on_gradient(parameter)``: called when a parameter's gradient is complete for the whole step; None while
      nobody wants it.
    - ``update(parameter)``: the optimizer's update of one parameter from its ``.grad``; the gradient is freed by
      the caller.
    - ``finish()``: what remains to be done when backward is over; by default clipping and ``optimizer.step()``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        loss_fn: LossFn,
        *,
        clip_grad_norm: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.clip_grad_norm = clip_grad_norm
        self.split: Callable[[Batch], Sequence[Share]] = whole
        self.on_gradient: Callable[[Tensor], None] | None = None
        self.update: Callable[[Tensor], None] = self._update_in_memory
        self.finish: Callable[[], None] = self._step_in_memory
        self.counts_steps = (
            True  # off while a step is only tried out, so that no hook or scheduler sees it
        )
        self.in_last_share = True  # gradients complete only in the last share of a step
        # staging buffers of methods, for the ledger
        self.owned: list[tuple[Column, Tensor]] = []
        # for each block, by its path, the codes in which saved storages are kept, by their number
        self.codes: dict[str, dict[int, PlacedCode]] = {}
        self.gradient_order: list[
            Tensor
        ] = []  # parameters, in the order in which gradients completed last step
        self._asked_folder = folder
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """A folder for offloaded bytes, made when first asked for and removed with the host."""
        if self._folder is None:
            parent = self._asked_folder
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="slimgrad-", dir=parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def parameters(self) -> list[Tensor]:
        """The parameters that the optimizer updates, each once, in its own order."""
        if self.optimizer is None:
            return [p for p in self.model.parameters() if p.requires_grad]
        return [
            p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad
        ]

    def _update_in_memory(self, parameter: Tensor) -> None:
        if self.optimizer is not None:
            step_parameter(self.optimizer, parameter)

    def _step_in_memory(self) -> None:
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad_norm)
        self.count_step()

    def count_step(self) -> None:
        """Call the user's ``optimizer.step()``, so that its hooks and schedulers count one logical step.

        Where every update is already done no parameter has a gradient left, and it updates nothing.
        """
        if self.optimizer is None:
            return
        if self.counts_steps:
            self.optimizer.step()
        else:
            plain_step(self.optimizer)
