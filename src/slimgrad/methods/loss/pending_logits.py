"""What a deferred tensor of logits stands for: a call of a linear head, and the steps taken since."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from slimgrad.errors import UnsupportedError
from slimgrad.methods.loss.linear_cross_entropy import (
    Backend,
    dtypes_under_autocast,
    loss_by_rule,
)
from slimgrad.methods.loss.loss_sweep import Rule

Step = Callable[[Tensor], Tensor]


@dataclass
class Outcome:
    """What became of the logits of one call of the head."""

    shape: tuple[int, ...]
    consumed: int = 0
    """Losses taken from hidden states and weight, without logits."""
    materialised_by: str | None = None
    """The first operation that needed the logits themselves, or None."""

    @property
    def is_lean(self) -> bool:
        """Whether a loss was taken and the logits never existed."""
        return self.consumed > 0 and self.materialised_by is None


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(eq=False)
class Origin:
    """One call of a linear head: its operands and the modes it ran under."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk_size: int
    backend: Backend
    outcome: Outcome
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)

    def __post_init__(self) -> None:
        device_type = self.hidden.device.type
        self.autocasts = torch.is_autocast_enabled(device_type)
        self.autocast_dtype = torch.get_autocast_dtype(device_type)
        self.logits_dtype = dtypes_under_autocast(self.hidden)[0]
        self._versions = [_version(t) for t in self._operands]

    @property
    def _operands(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def requires_grad(self) -> bool:
        """Whether the head's plain output would require a gradient."""
        return self.grad_enabled and any(t.requires_grad for t in self._operands)

    def check_unchanged(self) -> None:
        """Raise UnsupportedError if an operand was changed in place since the head was called."""
        if self._versions != [_version(t) for t in self._operands]:
            raise UnsupportedError(
                "expected the deferred logits to be read before their head's weight, bias or input changes, found "
                "one of these changed in place since the forward pass (by optimizer.step(), most likely): the logits "
                "were never computed. Read them before the update, or detach the chunked loss"
            )

    def linear(self) -> Tensor:
        """The head's plain output."""
        self.check_unchanged()
        device_type = self.hidden.device.type
        with (
            _modes(self.grad_enabled, self.inference),
            torch.autocast(device_type, dtype=self.autocast_dtype, enabled=self.autocasts),
        ):
            return functional.linear(self.hidden, self.weight, self.bias)


@contextmanager
def _modes(grad_enabled: bool, inference: bool) -> Generator[None]:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad_enabled):
        yield


@dataclass(eq=False)
class Pending:
    """What one stand-in stands for: ``step`` of its parent's logits, or the head's output itself.

    For a loss without logits: ``hidden`` is the head's input after the same moves of the token dimensions, with
    ``D`` features where the logits have ``V`` classes (dimension ``class_dim``), and the logits are
    ``pre * (hidden W^T + bias)``, or ``post * tanh`` of that. ``shape_only`` is a meta tensor of its geometry.
    """

    origin: Origin
    shape_only: Tensor
    hidden: Tensor
    bias: Tensor | None
    class_dim: int
    requires_grad: bool
    parent: Pending | None = None
    step: Step | None = None
    copies: bool = True
    """Whether this owns its values; a view shares those of its parent."""
    pre: float = 1.0
    post: float | None = None
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)
    inference: bool = field(default_factory=torch.is_inference_mode_enabled)
    real: Tensor | None = None
    _real_version: int = 0

    @property
    def owner(self) -> Pending:
        """The stand-in whose values this one shows."""
        return self if self.copies or self.parent is None else self.parent.owner

    @property
    def is_computed(self) -> bool:
        """Whether the values exist, so that they may also have been changed in place."""
        return self.owner.real is not None

    @property
    def _was_changed(self) -> bool:
        real = self.owner.real
        return real is not None and (
            real.is_inference() or real._version != self.owner._real_version
        )

    def materialise(self, needed_by: str) -> Tensor:
        """The real logits, computed once."""
        if self.real is None:
            if self.origin.outcome.materialised_by is None:
                self.origin.outcome.materialised_by = needed_by
            self.real = self._compute(needed_by)
            self._real_version = _version(self.real)
        return self.real

    def _compute(self, needed_by: str) -> Tensor:
        if self.parent is None:
            return self.origin.linear()
        if self.copies and self.parent._was_changed:
            return self._compute_afresh()
        return self._apply_step(self.parent.materialise(needed_by))

    def _compute_afresh(self) -> Tensor:
        # the parent's values were changed in place after this step was taken
        return (
            self.origin.linear()
            if self.parent is None
            else self._apply_step(self.parent._compute_afresh())
        )

    def _apply_step(self, source: Tensor) -> Tensor:
        assert self.step is not None
        with _modes(self.grad_enabled, self.inference):
            return self.step(source)

    @property
    def backward_is_possible(self) -> bool:
        """Whether the real logits still are what a C++ operation may have read."""
        return not self._was_changed or self.inference

    def cross_entropy(
        self, target: Tensor, ignore_index: int, label_smoothing: float, reduction: str
    ) -> Tensor:
        """The loss from hidden states and weight."""
        origin = self.origin
        origin.check_unchanged()
        loss_dtype = self.shape_only.dtype
        if torch.is_autocast_enabled(self.hidden.device.type):
            loss_dtype = torch.promote_types(loss_dtype, torch.float32)
        rule = Rule(
            origin.logits_dtype,
            loss_dtype,
            origin.chunk_size,
            ignore_index,
            label_smoothing,
            self.pre,
            self.post,
            "mean" if reduction == "mean" else "sum",
        )
        hidden = self.hidden.movedim(self.class_dim, -1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.requires_grad):
            loss = loss_by_rule(hidden, origin.weight, self.bias, target, rule, origin.backend)
        origin.outcome.consumed += 1
        return loss
