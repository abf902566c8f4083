"""The three objects that every stage takes, told apart before anything is asked of them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from slimgrad.errors import ArgumentError, UnsupportedError


def check_arguments(model: Any, optimizer: Any, loss_fn: Any) -> None:
    """Raise ``ArgumentError`` where one of them is something else, ``UnsupportedError`` for a GradScaler."""
    if isinstance(model, Optimizer) and isinstance(optimizer, nn.Module):
        raise ArgumentError(
            f"the model and the optimizer are in each other's place (found {type(model).__name__} first): the "
            "order is model, optimizer, loss_fn, batch"
        )
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"expected a torch.nn.Module for the model, found {type(model).__name__}: the order is model, "
            "optimizer, loss_fn, batch"
        )
    if type(optimizer).__name__ == "GradScaler":
        raise UnsupportedError(
            "GradScaler is not supported: it decides after backward whether to update at all. Train in bfloat16 "
            "under torch.autocast inside loss_fn, which needs no scaling, and give the optimizer itself"
        )
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ArgumentError(
            f"expected a torch.optim.Optimizer or None for the optimizer, found {type(optimizer).__name__}: the "
            "order is model, optimizer, loss_fn, batch"
        )
    if not callable(loss_fn):
        raise ArgumentError(
            f"expected a function for loss_fn, found {type(loss_fn).__name__}: loss_fn(model, batch) runs the "
            "model on a batch and returns a scalar loss"
        )
