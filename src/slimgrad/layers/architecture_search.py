"""Differentiable architecture search of first order: weights and architecture parameters trained in turns.

Source: Liu et al., DARTS, algorithm 1 with a step of 0 for the weights (section 2.3); its defaults here are those of
Zhao et al., Memory-Efficient Differentiable Transformer Architecture Search, for Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from slimgrad.errors import ArgumentError
from slimgrad.layers.mixed_operation import MixedOperation


@dataclass
class SearchHistory:
    """The losses of the batches that weights and architecture parameters were trained on, before each update."""

    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)


def architecture_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the choices in ``model``, each once. Raises ArgumentError where it has no MixedOperation."""
    found = [m.alpha for m in model.modules() if isinstance(m, MixedOperation)]
    if not found:
        raise ArgumentError(
            f"expected a MixedOperation in {type(model).__name__}, found none: there is nothing to search"
        )
    return list(dict.fromkeys(found))


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter that is no architecture parameter."""
    apart = {id(alpha) for alpha in architecture_parameters(model)}
    return [p for p in model.parameters() if id(p) not in apart]


def search(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    training: Iterable[Any],
    validation: Iterable[Any],
    *,
    weight_optimizer: Optimizer | None = None,
    architecture_optimizer: Optimizer | None = None,
) -> SearchHistory:
    """One update of the weights and one of the architecture for each pair of batches, until either runs out.

    ``training`` and ``validation`` are batches of two halves of the data. ``loss_fn(model, batch)`` returns a scalar.
    Each optimizer holds parameters of its own kind only, or ArgumentError is raised.
    """
    weights, alphas = weight_parameters(model), architecture_parameters(model)
    by_weights = weight_optimizer or Adam(weights, lr=5e-4, betas=(0.9, 0.98))
    by_alphas = architecture_optimizer or Adam(
        alphas, lr=3e-4, betas=(0.9, 0.98), weight_decay=1e-3
    )
    _check_apart(by_weights, alphas, "weight_optimizer")
    _check_apart(by_alphas, weights, "architecture_optimizer")
    history = SearchHistory()
    for batch, other in zip(training, validation, strict=False):
        with _frozen(alphas):
            history.training.append(_step(model, loss_fn, batch, by_weights))
        with _frozen(weights):
            history.validation.append(_step(model, loss_fn, other, by_alphas))
    return history


def _step(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, optimizer: Optimizer
) -> float:
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """The other half's gradients are neither computed nor held."""
    trained = [p for p in parameters if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check_apart(optimizer: Optimizer, others: Sequence[Tensor], name: str) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(other) in held for other in others):
        raise ArgumentError(
            f"expected {name} to hold one kind of parameters, found both: weights are trained on one half of "
            "the data and the architecture on the other"
        )
