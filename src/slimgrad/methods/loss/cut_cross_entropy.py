"""Cross-entropy of a linear layer over a large vocabulary whose logits exist one tile at a time.

Formula: loss = logsumexp(z) - z_t, z = x W^T + b; tile by tile over tokens and classes with a running sum.
    Backward: tiles again, dz = softmax(z) - onehot(t); a tile whose every entry is below ``filter_eps`` is left out
Memory: temporaries are one tile of logits; saved are the hidden states, the weight (alive anyway) and one number a
    token. ``chunked_cross_entropy`` holds the weight's gradient from the loss on; here it is made in backward.
Exactness: exact with ``filter_eps=None``; with a threshold each entry of the gradient in the logits that is left out
    is below it. ``"auto"`` is a 32nd of the dtype's own spacing at 1 (2^-12 in bfloat16): less than its rounding.
Limits: targets are class numbers; no double backward; the kernel sums in float32; label smoothing goes without softcap.
References: Wijmans et al. (2024), algorithms 1 to 3, and their repository ml-cross-entropy for the thresholds.
    *departs:* a tile with a target in it is always computed; classes are sorted by their mean logit in backward only.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from slimgrad.errors import MethodError
from slimgrad.method import Paper, component
from slimgrad.methods.loss.cut_tiles import CutLogits, Tiling
from slimgrad.methods.loss.linear_cross_entropy import check_targets, dtypes_under_autocast
from slimgrad.types import Column, Exactness

Filter = float | Literal["auto"] | None
Backend = Literal["auto", "torch", "triton"]

TOKEN_BLOCK, VOCAB_BLOCK = 256, 2048


@component(
    Column.TEMPORARIES,
    Exactness.EXACT,
    Paper(
        "Cut Your Losses in Large-Vocabulary Language Models",
        "Erik Wijmans, Brody Huval, Alexander Hertzberg, Vladlen Koltun, Philipp Krähenbühl",
        2024,
        "2411.09009",
    ),
)
def cut_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    filter_eps: Filter = "auto",
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
    backend: Backend = "auto",
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), target)``; no tensor has tokens times classes elements.

    ``hidden`` is ``[..., D]``, ``weight`` ``[V, D]``, ``bias`` ``[V]``, ``target`` ``[...]`` of int64; the result is a
    scalar, or ``[...]`` with ``reduction="none"``, in float32 at least. Logits are multiplied by ``scale`` and, with
    ``softcap``, become ``softcap * tanh(logits / softcap)``. Under autocast products have its dtype.

    Raises ``MethodError`` for arguments out of bounds and ``IndexError`` for a target outside ``[0, V)`` that is not
    ``ignore_index``.

    >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2)
    >>> cut_cross_entropy(hidden, weight, torch.tensor([0, 1, 3])).item() == torch.tensor(4.0).log().item()
    True
    """
    aim_N, lse_N, target_N = aims_and_sums(
        hidden, weight, target, bias, ignore_index=ignore_index, softcap=softcap, scale=scale,
        filter_eps=filter_eps, token_block=token_block, vocab_block=vocab_block, backend=backend,
    )  # fmt: skip
    is_valid_N = target_N >= 0
    if label_smoothing:
        aim_N = _smoothed(hidden, weight, bias, aim_N, label_smoothing, softcap, scale)
    loss_N = (lse_N - aim_N).masked_fill(~is_valid_N, 0.0)
    if reduction == "none":
        return loss_N.view(target.shape)
    if reduction == "sum":
        return loss_N.sum()
    if reduction == "mean":
        return loss_N.sum() / is_valid_N.sum()
    raise MethodError(f"expected reduction 'mean', 'sum' or 'none', found {reduction!r}")


def aims_and_sums(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    softcap: float | None = None,
    scale: float = 1.0,
    filter_eps: Filter = "auto",
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's target logit and log-sum-exp, ``[N]``, both differentiable; and its target, -1 where ignored."""
    check_shapes(hidden, weight, bias)
    if target.shape != hidden.shape[:-1] or target.dtype != torch.int64:
        raise MethodError(
            f"expected int64 targets of shape {tuple(hidden.shape[:-1])}, found {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    target_N = target.reshape(-1)
    check_targets(target_N, len(weight), ignore_index)
    target_N = target_N.masked_fill(target_N == ignore_index, -1)
    tiling = tiling_for(hidden, scale, softcap, filter_eps, token_block, vocab_block, backend)
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    aim_N, lse_N = CutLogits.apply(x_ND, weight, bias, target_N, tiling)  # pyright: ignore[reportGeneralTypeIssues]
    return aim_N, lse_N, target_N


def check_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ``MethodError`` where the three are no linear layer's."""
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise MethodError(
            f"expected hidden [..., D] and weight [V, D], found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise MethodError(f"expected bias [{weight.shape[0]}], found {tuple(bias.shape)}")


def tiling_for(
    hidden: Tensor,
    scale: float,
    softcap: float | None,
    filter_eps: Filter,
    token_block: int,
    vocab_block: int,
    backend: Backend,
) -> Tiling:
    """The tiles for logits of ``hidden``; raises ``MethodError`` for arguments out of bounds."""
    if token_block < 1 or vocab_block < 1:
        raise MethodError(
            f"expected blocks of at least 1, found {token_block} tokens and {vocab_block} classes"
        )
    if softcap == 0 or scale == 0:
        raise MethodError("expected a softcap and a scale other than 0")
    if filter_eps not in (None, "auto") and not 0 <= float(filter_eps) < 1:
        raise MethodError(f"expected filter_eps in [0, 1), 'auto' or None, found {filter_eps}")
    dtype, _ = dtypes_under_autocast(hidden)
    if backend not in ("auto", "torch", "triton"):
        raise MethodError(f"expected backend 'auto', 'torch' or 'triton', found {backend!r}")
    if backend == "triton" and dtype == torch.float64:
        raise MethodError("the Triton kernel sums in float32: expected another dtype than float64")
    below = torch.finfo(dtype).eps / 32 if filter_eps == "auto" else float(filter_eps or 0.0)
    fits = hidden.is_cuda and dtype != torch.float64
    uses_triton = backend == "triton" or (backend == "auto" and fits)
    return Tiling(token_block, vocab_block, dtype, scale, softcap, below, uses_triton)


def _smoothed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    aim_N: Tensor,
    label_smoothing: float,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """The aims with a share of every class's logit: their mean is the mean row's logit."""
    if not 0.0 <= label_smoothing <= 1.0 or softcap is not None:
        raise MethodError(
            f"expected label_smoothing in [0, 1] and then no softcap, found {label_smoothing} and {softcap}"
        )
    mean_N = hidden.reshape(-1, hidden.shape[-1]).to(aim_N.dtype) @ weight.to(aim_N.dtype).mean(0)
    if bias is not None:
        mean_N = mean_N + bias.mean()
    return (1 - label_smoothing) * aim_N + label_smoothing * scale * mean_N
