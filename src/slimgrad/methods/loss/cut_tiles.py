"""Logits of a linear layer, tile by tile over tokens and vocabulary: what losses need of them, and the gradient.

Shapes: ``N`` tokens, ``D`` features, ``V`` classes; a tile has ``C`` tokens and ``R`` classes. With ``z = scale *
(x W^T + b)`` and, where asked, ``z <- softcap tanh(z / softcap)``, the forward pass gives each token's aim ``z_t``
and ``lse = logsumexp(z)``; whatever is a function of those two costs no more. In backward tiles are computed again:
the gradient in ``z`` is ``g_aim onehot(t) + g_lse softmax(z)``. Nothing is kept in between but ``lse``, ``[N]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimgrad.single_backward import single_backward


@dataclass(frozen=True)
class Tiling:
    """How large tiles are, what a logit is, and below which probability a whole tile's gradient is left out.

    ``filter_below`` 0: nothing is left out. ``matmul_dtype`` is that of the products; sums are in float32 at least.
    """

    token_block: int
    vocab_block: int
    matmul_dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    filter_below: float = 0.0
    uses_triton: bool = False

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of softmax and sums."""
        return torch.promote_types(self.matmul_dtype, torch.float32)

    def spans(self, num: int, block: int) -> Iterator[slice]:
        """The blocks of ``num`` rows."""
        return (slice(start, min(start + block, num)) for start in range(0, num, block))

    def tile(self, x_CD: Tensor, w_RD: Tensor, b_R: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits ``[C, R]`` in the working dtype, and with a softcap the ``tanh`` that they are made of."""
        z_CR = x_CD.to(self.matmul_dtype) @ w_RD.to(self.matmul_dtype).t()
        if b_R is not None:
            z_CR += b_R.to(self.matmul_dtype)
        z_CR = z_CR.to(self.work_dtype)
        if self.scale != 1.0:
            z_CR *= self.scale
        if self.softcap is None:
            return z_CR, None
        tanh_CR = z_CR.div_(self.softcap).tanh_()
        return tanh_CR * self.softcap, tanh_CR

    def before_logits(self, grad_CR: Tensor, tanh_CR: Tensor | None) -> Tensor:
        """The gradient in ``x W^T + b`` from that in the logits, in place."""
        if tanh_CR is not None:
            grad_CR *= tanh_CR.square_().neg_().add_(1)
        return grad_CR.mul_(self.scale) if self.scale != 1.0 else grad_CR


class RunningSum:
    """``logsumexp`` over classes that come block by block, for all tokens; ``[N]`` each."""

    def __init__(self, num_tokens: int, like: Tensor, dtype: torch.dtype) -> None:
        self.top_N = like.new_full((num_tokens,), -torch.inf, dtype=dtype)
        self.sum_N = like.new_zeros((num_tokens,), dtype=dtype)

    def add(self, rows: slice, z_CR: Tensor) -> tuple[Tensor, Tensor]:
        """Take in a tile, which becomes ``exp(z - top)``; returns that and what older sums were multiplied by."""
        top_C = torch.maximum(self.top_N[rows], z_CR.amax(1))
        shrink_C = (self.top_N[rows] - top_C).exp_()
        z_CR.sub_(top_C.unsqueeze(1)).exp_()
        self.sum_N[rows] = self.sum_N[rows] * shrink_C + z_CR.sum(1)
        self.top_N[rows] = top_C
        return z_CR, shrink_C

    def lse(self) -> Tensor:
        """The logarithm of the sums."""
        return self.sum_N.log() + self.top_N


def aims_in(target_C: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Of the tokens of a tile, those whose target lies in it, and its place there."""
    inside = (target_C >= classes.start) & (target_C < classes.stop)
    rows = inside.nonzero().squeeze(1)
    return rows, target_C[rows] - classes.start


def forward_by_tiles(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, target_N: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``aim_N``, ``lse_N`` and, where tiles will be left out, the sum of each class's logits, ``[V]``."""
    num_tokens, num_classes = len(x_ND), len(w_VD)
    running = RunningSum(num_tokens, x_ND, tiling.work_dtype)
    aim_N = torch.zeros_like(running.sum_N)
    total_V = aim_N.new_zeros(num_classes) if tiling.filter_below else None
    for classes in tiling.spans(num_classes, tiling.vocab_block):
        w_RD, b_R = w_VD[classes], None if b_V is None else b_V[classes]
        for rows in tiling.spans(num_tokens, tiling.token_block):
            z_CR, _ = tiling.tile(x_ND[rows], w_RD, b_R)
            if total_V is not None:
                total_V[classes] += z_CR.sum(0)
            tokens, places = aims_in(target_N[rows], classes)
            aim_N[rows][tokens] = z_CR[tokens, places]
            running.add(rows, z_CR)
    return aim_N, running.lse(), total_V


@dataclass(frozen=True)
class Gradients:
    """The gradients in hidden states, weight and bias; None where none is asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradient_buffers(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, needs: tuple[bool, ...], work: torch.dtype
) -> Gradients:
    """Zeros: hidden states' in the working dtype, for they are summed over all classes; the others in their own."""
    return Gradients(
        torch.zeros_like(x_ND, dtype=work) if needs[0] else None,
        torch.zeros_like(w_VD) if needs[1] else None,
        torch.zeros_like(b_V) if needs[2] and b_V is not None else None,
    )


def accumulate(
    grads: Gradients,
    rows: slice,
    d_CR: Tensor,
    x_CD: Tensor,
    w_RD: Tensor,
    sum_RD: Tensor | None,
    sum_R: Tensor | None,
    matmul_dtype: torch.dtype,
) -> None:
    """Add what a tile's gradient ``d_CR`` gives; the weight's and bias's to the block's own sums."""
    low_CR = d_CR.to(matmul_dtype)
    if grads.hidden is not None:
        grads.hidden[rows] += low_CR @ w_RD.to(matmul_dtype)
    if sum_RD is not None:
        sum_RD += low_CR.t() @ x_CD.to(matmul_dtype)
    if sum_R is not None:
        sum_R += d_CR.sum(0)


def backward_by_tiles(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    target_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    g_aim_N: Tensor,
    g_lse_N: Tensor,
    needs: tuple[bool, ...],
    tiling: Tiling,
) -> tuple[Gradients, int]:
    """The gradients, and how many tiles were left out: those in which no probability reaches the filter.

    ``order_V`` sorts the classes, so that those that are never likely come in the same tiles.
    """
    grads = gradient_buffers(x_ND, w_VD, b_V, needs, tiling.work_dtype)
    place_N, skipped = target_N, 0
    if order_V is not None:
        place_V = torch.empty_like(order_V)
        place_V[order_V] = torch.arange(len(order_V), device=order_V.device)
        place_N = torch.where(target_N >= 0, place_V[target_N.clamp(min=0)], target_N)
    for classes in tiling.spans(len(w_VD), tiling.vocab_block):
        which: Any = classes if order_V is None else order_V[classes]
        w_RD, b_R = w_VD[which], None if b_V is None else b_V[which]
        sum_RD = torch.zeros_like(w_RD, dtype=tiling.work_dtype) if needs[1] else None
        sum_R = (
            torch.zeros_like(b_R, dtype=tiling.work_dtype) if needs[2] and b_R is not None else None
        )
        for rows in tiling.spans(len(x_ND), tiling.token_block):
            x_CD = x_ND[rows]
            z_CR, tanh_CR = tiling.tile(x_CD, w_RD, b_R)
            p_CR = z_CR.sub_(lse_N[rows].unsqueeze(1)).exp_()
            tokens, places = aims_in(place_N[rows], classes)
            if tiling.filter_below and not len(tokens) and p_CR.amax() < tiling.filter_below:
                skipped += 1
                continue
            d_CR = p_CR.mul_(g_lse_N[rows].unsqueeze(1))
            d_CR[tokens, places] += g_aim_N[rows][tokens]
            d_CR = tiling.before_logits(d_CR, tanh_CR)
            accumulate(grads, rows, d_CR, x_CD, w_RD, sum_RD, sum_R, tiling.matmul_dtype)
        if grads.weight is not None and sum_RD is not None:
            grads.weight[which] = sum_RD.to(w_VD.dtype)
        if grads.bias is not None and sum_R is not None:
            grads.bias[which] = sum_R.to(grads.bias.dtype)
    return grads, skipped


class CutLogits(torch.autograd.Function):
    """``(aim_N, lse_N)`` of a linear layer's logits; targets below 0 have the aim 0 and no gradient from it."""

    @staticmethod
    def forward(  # noqa: D102 - torch's own name
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor | None,
        target_N: Tensor,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(x_ND.device.type, enabled=False):
            run = _forward_by_kernel if tiling.uses_triton else forward_by_tiles
            aim_N, lse_N, total_V = run(x_ND, w_VD, b_V, target_N, tiling)
        order_V = None if total_V is None else total_V.argsort(descending=True)
        ctx.save_for_backward(x_ND, w_VD, b_V, target_N, lse_N, order_V)
        ctx.tiling = tiling
        return aim_N, lse_N

    @staticmethod
    @single_backward("the loss by tiles")
    def backward(  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        run: Any = _backward_by_kernel if ctx.tiling.uses_triton else backward_by_tiles
        with torch.autocast(grad_outputs[0].device.type, enabled=False):
            grads, _ = run(*saved, *grad_outputs, ctx.needs_input_grad[:3], ctx.tiling)
            grad_x = None if grads.hidden is None else grads.hidden.to(saved[0].dtype)
        return grad_x, grads.weight, grads.bias, None, None


def _operands(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a kernel reads, in the dtype of its products, rows one after the other."""
    bias = None if b_V is None else b_V.to(dtype).contiguous()
    return x_ND.to(dtype).contiguous(), w_VD.to(dtype).contiguous(), bias


def _forward_by_kernel(
    x_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, target_N: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor, Tensor | None]:
    from slimgrad.kernels.cut_logits import lse_by_kernel

    x_ND, w_VD, b_V = _operands(x_ND, w_VD, b_V, tiling.matmul_dtype)
    return lse_by_kernel(
        x_ND, w_VD, b_V, target_N,
        scale=tiling.scale, softcap=tiling.softcap, wants_total=tiling.filter_below > 0,
    )  # fmt: skip


def _backward_by_kernel(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    target_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    g_aim_N: Tensor,
    g_lse_N: Tensor,
    needs: tuple[bool, ...],
    tiling: Tiling,
) -> tuple[Gradients, int]:
    from slimgrad.kernels.cut_logits import gradient_by_kernel

    operands = _operands(x_ND, w_VD, b_V, tiling.matmul_dtype)
    (dx, dw, db), skipped = gradient_by_kernel(
        *operands, target_N, lse_N, order_V, g_aim_N, g_lse_N, needs,
        scale=tiling.scale, softcap=tiling.softcap, filter_below=tiling.filter_below,
    )  # fmt: skip
    dw = None if dw is None else dw.to(w_VD.dtype)
    return Gradients(dx, dw, None if db is None or b_V is None else db.to(b_V.dtype)), skipped
