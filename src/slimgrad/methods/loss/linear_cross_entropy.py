"""Cross-entropy of a linear layer's outputs that never holds the logits, as one function.

The mathematics is in ``loss_sweep``; here arguments are checked and a backend is chosen.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from slimgrad.errors import MethodError
from slimgrad.methods.loss.loss_sweep import LinearCrossEntropy, Reduction, Rule

Backend = Literal["slimgrad", "torch"]

DEFAULT_CHUNK_SIZE = 256
"""Tokens of one chunk; measured: see the card of ``chunked_cross_entropy``."""


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    upcast: torch.dtype | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "slimgrad",
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), target)`` without ever holding the logits.

    ``hidden`` is ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]`` and ``target`` ``[...]`` of int64; the
    result is a scalar. Logits are multiplied by ``scale`` and then, with ``softcap``, become
    ``softcap * tanh(logits / softcap)``; ``upcast`` is the dtype the loss is taken in (``logits.float()`` of a
    plain model). Gradients of whatever requires one are computed together with the loss; under ``no_grad`` only
    the loss is. Under autocast the logits have the autocast dtype and the loss float32.

    ``backend="torch"`` calls ``torch.nn.functional.linear_cross_entropy`` with the same chunk instead.

    Raises ``MethodError`` for arguments out of bounds or unknown to the backend, ``IndexError`` for a target
    outside ``[0, V)`` that is not ``ignore_index``, ``UnsupportedError`` for a second backward pass of a graph
    that was not retained, and for a double backward.

    >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2)
    >>> chunked_linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 3])).item() == torch.tensor(4.0).log().item()
    True
    """
    _check_arguments(chunk_size, label_smoothing, softcap, scale, reduction)
    _check_shapes(hidden, weight, target, bias)
    logits_dtype, loss_dtype = dtypes_under_autocast(hidden)
    if upcast is not None:
        loss_dtype = torch.promote_types(upcast, loss_dtype) if _autocasts(hidden) else upcast
    if hidden.dtype != weight.dtype and not _autocasts(hidden):
        raise MethodError(
            f"expected hidden and weight of one dtype, found {hidden.dtype} and {weight.dtype}: "
            "convert one of them, or use autocast"
        )
    rule = Rule(
        logits_dtype,
        loss_dtype,
        chunk_size,
        ignore_index,
        label_smoothing,
        pre=scale if softcap is None else scale / softcap,
        post=softcap,
        reduction=reduction,
    )
    return loss_by_rule(hidden, weight, bias, target, rule, backend)


def loss_by_rule(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    rule: Rule,
    backend: Backend = "slimgrad",
) -> Tensor:
    """As ``chunked_linear_cross_entropy``, with arguments already checked and gathered in ``rule``."""
    target_N = target.reshape(-1)
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    check_targets(target_N, weight.shape[0], rule.ignore_index)
    if backend == "torch":
        return _by_core(x_ND, weight, bias, target_N, rule)
    needs = tuple(
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x_ND, weight, bias)
    )
    # what a double backward would have to pass, so that it meets an error; an empty slice holds no hidden states
    links = (x_ND[:0].clone() if needs[0] else None, weight, bias)
    return LinearCrossEntropy.apply(x_ND, weight, bias, target_N, rule, needs, links)  # type: ignore[no-any-return]


def dtypes_under_autocast(hidden: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of ``linear``'s logits and of ``cross_entropy``'s loss for ``hidden`` right now."""
    if _autocasts(hidden):
        return torch.get_autocast_dtype(hidden.device.type), torch.float32
    return hidden.dtype, hidden.dtype


def core_is_present() -> bool:
    """Whether torch itself has ``linear_cross_entropy`` with a choice of chunk (2.13 and later)."""
    return hasattr(functional, "linear_cross_entropy") and hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    )


def _autocasts(hidden: Tensor) -> bool:
    # autocast leaves float64 alone
    return torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64


def _check_arguments(
    chunk_size: int, label_smoothing: float, softcap: float | None, scale: float, reduction: str
) -> None:
    if chunk_size < 1:
        raise MethodError(f"expected chunk_size of at least 1 token, found {chunk_size}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise MethodError(f"expected label_smoothing in [0, 1], found {label_smoothing}")
    if softcap is not None and softcap == 0:
        raise MethodError("expected a softcap other than 0: give None for no capping")
    if scale == 0:
        raise MethodError("expected a scale other than 0")
    if reduction not in ("mean", "sum"):
        raise MethodError(
            f"expected reduction 'mean' or 'sum', found {reduction!r}: for a loss per token use "
            "torch.nn.functional.cross_entropy on the logits"
        )


def _check_shapes(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise MethodError(
            f"expected hidden [..., D] and weight [V, D], found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise MethodError(
            f"expected int64 targets of shape {tuple(hidden.shape[:-1])}, found {target.dtype} of shape "
            f"{tuple(target.shape)}: class probabilities need the logits"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise MethodError(f"expected bias [{weight.shape[0]}], found {tuple(bias.shape)}")


def check_targets(target_N: Tensor, num_classes: int, ignore_index: int) -> None:
    """As torch, ``IndexError`` on the CPU; elsewhere the gather kernel's own assertion, without waiting for it."""
    if target_N.device.type != "cpu" or isinstance(target_N, FakeTensor) or target_N.numel() == 0:
        return
    bad_N = ((target_N < 0) | (target_N >= num_classes)) & (target_N != ignore_index)
    if bool(bad_N.any()):
        first = int(target_N[bad_N][0])
        raise IndexError(
            f"Target {first} is out of bounds: expected a class in [0, {num_classes}) or ignore_index={ignore_index}"
        )


def _by_core(
    x_ND: Tensor, weight: Tensor, bias: Tensor | None, target_N: Tensor, rule: Rule
) -> Tensor:
    if not core_is_present():
        raise MethodError(
            f"backend 'torch' needs torch 2.13 or later, found {torch.__version__}: use backend 'slimgrad'"
        )
    if rule.pre != 1.0 or rule.post is not None or rule.label_smoothing:
        raise MethodError(
            "torch's chunked linear_cross_entropy knows no softcap, scale or label smoothing: use backend 'slimgrad'"
        )
    if rule.loss_dtype != rule.logits_dtype:
        raise MethodError(
            f"torch's linear_cross_entropy takes the loss in the dtype of the logits ({rule.logits_dtype}), found "
            f"a model that takes it in {rule.loss_dtype}: use backend 'slimgrad'"
        )
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rule.chunk_size)
    return functional.linear_cross_entropy(
        x_ND,
        weight,
        target_N,
        linear_bias=bias,
        reduction=rule.reduction,
        ignore_index=rule.ignore_index,
        label_smoothing=rule.label_smoothing,
        options=options,
    )
