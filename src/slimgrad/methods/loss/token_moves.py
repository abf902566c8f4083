"""Moves of the token dimensions that deferred logits follow: the same move is made on the hidden states.

Each rule answers a call with another stand-in, or with ``NotImplemented``: then the logits are computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from slimgrad.methods.loss.deferred_logits import DeferredLogits, stand_in, unseen
from slimgrad.methods.loss.pending_logits import Pending

Args: TypeAlias = Sequence[Any]
Kwargs: TypeAlias = Mapping[str, Any]
StepRule: TypeAlias = Callable[[DeferredLogits, Any, Args, Kwargs], Any]


def next_stand_in(
    pending: Pending,
    step: Callable[[Tensor], Tensor],
    *,
    copies: bool | None = None,
    **changes: Any,
) -> DeferredLogits:
    """The stand-in for ``step`` of ``pending``'s logits; ``step`` is also what gives its geometry."""
    with unseen():
        shape_only = step(pending.shape_only)
        if copies is None:
            mine, theirs = shape_only.untyped_storage(), pending.shape_only.untyped_storage()
            copies = mine._cdata != theirs._cdata
    grad_enabled = torch.is_grad_enabled()
    fields: dict[str, Any] = {
        "shape_only": shape_only,
        "requires_grad": pending.requires_grad and grad_enabled,
        "grad_enabled": grad_enabled,
        "inference": torch.is_inference_mode_enabled(),
        "parent": pending,
        "step": step,
        "copies": copies,
        "real": None,
    }
    return stand_in(dataclasses.replace(pending, **(fields | changes)))


def reshape(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Views that keep the last dimension: only tokens are regrouped."""
    pending = logits.pending
    geometry = pending.shape_only
    if pending.class_dim != geometry.dim() - 1 or _has_tensor_or_dtype(args, kwargs):
        return NotImplemented

    def step(source: Tensor) -> Tensor:
        return func(source, *args, **kwargs)

    with unseen():
        shape = tuple(step(geometry).shape)
    if not shape or shape[-1] != geometry.shape[-1]:
        return NotImplemented
    # the order of elements stays, and with it the last dimension: only tokens were regrouped
    hidden = pending.hidden.reshape((*shape[:-1], pending.hidden.shape[-1]))
    return next_stand_in(pending, step, hidden=hidden, class_dim=len(shape) - 1)


def permute(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Any exchange of dimensions, the classes' among them."""
    pending = logits.pending

    def step(source: Tensor) -> Tensor:
        return func(source, *args, **kwargs)

    with unseen():  # dimensions of unlike sizes tell where each one went
        marked = torch.empty(tuple(range(1, pending.shape_only.dim() + 1)), device="meta")
        class_dim = tuple(step(marked).shape).index(pending.class_dim + 1)
    return next_stand_in(pending, step, hidden=step(pending.hidden), class_dim=class_dim)


def index(logits: DeferredLogits, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Basic indexing that keeps every class."""
    pending = logits.pending
    geometry = pending.shape_only
    asked = args[0] if isinstance(args[0], tuple) else (args[0],)
    if not all(a is None or a is Ellipsis or isinstance(a, slice) or type(a) is int for a in asked):
        return NotImplemented
    if any(
        isinstance(part, Tensor)
        for a in asked
        if isinstance(a, slice)
        for part in (a.start, a.stop, a.step)
    ):
        return NotImplemented
    num_named = sum(a is not None and a is not Ellipsis for a in asked)
    if sum(a is Ellipsis for a in asked) > 1 or num_named > geometry.dim():
        return NotImplemented
    if Ellipsis not in asked:
        asked = (*asked, Ellipsis)
    place = asked.index(Ellipsis)
    fill = (slice(None),) * (geometry.dim() - num_named)
    index: list[Any] = [*asked[:place], *fill, *asked[place + 1 :]]
    named = [i for i, a in enumerate(index) if a is not None]
    class_place = named[pending.class_dim]
    num_classes = geometry.shape[pending.class_dim]
    kept = index[class_place]
    if not isinstance(kept, slice) or kept.indices(num_classes) != (0, num_classes, 1):
        return NotImplemented
    index[class_place] = slice(None)
    class_dim = sum(type(a) is not int for a in index[:class_place])
    whole = tuple(index)
    return next_stand_in(
        pending, lambda source: source[whole], hidden=pending.hidden[whole], class_dim=class_dim
    )


def _has_tensor_or_dtype(args: Args, kwargs: Kwargs) -> bool:
    return any(isinstance(a, (Tensor, torch.dtype)) for a in (*args, *kwargs.values()))
