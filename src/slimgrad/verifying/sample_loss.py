"""Whether the loss of a sample batch is a number at all: fake tensors cannot tell."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from slimgrad.errors import NonFiniteLoss
from slimgrad.host import LossFn
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.trace import untouched


def refuse_non_finite(model: nn.Module, loss_fn: LossFn, batch: Any) -> None:
    """Raise ``NonFiniteLoss`` where the loss of ``batch`` is NaN or infinite.

    One forward pass without gradients is run, and nothing is changed by it. Where it cannot be run nothing is said.
    """
    if any(is_fake(p) for p in model.parameters()):
        return
    try:
        with untouched(model), torch.no_grad():
            value = float(loss_fn(model, batch).detach())
    except Exception:  # not enough memory, for one: whoever asks has an error of its own to raise
        return
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the loss of the sample batch is {value}: nothing can be planned or verified on it, and nothing was "
            "changed. Look at the batch and at the model's weights"
        )
