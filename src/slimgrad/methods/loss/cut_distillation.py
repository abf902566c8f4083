"""Distillation into a student of a large vocabulary: the divergence from a teacher, without either's logits.

Formula: loss = T^2 KL(softmax(t / T) || softmax(z / T)) = T^2 (sum_v p_v (t_v - z_v) / T - lse_t + lse_z), with
    p = softmax(t / T); the sum runs over tiles together with both running maxima. dz = T (softmax(z / T) - p)
Memory: temporaries are one tile of the student's and one of the teacher's logits; saved are both hidden states and
    two numbers a token.
Exactness: exact: the same sums in another order.
Limits: the teacher gets no gradient; both have the same classes, their widths may differ; no double backward.
References: Hinton, Vinyals and Dean (2015), section 2, for the loss and its factor T^2; Wijmans et al. (2024) for the
    tiles. *departs:* no gradient is left out: a small probability may have a large difference beside it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from slimgrad.errors import MethodError
from slimgrad.method import Paper, component
from slimgrad.methods.loss.cut_cross_entropy import (
    TOKEN_BLOCK,
    VOCAB_BLOCK,
    check_shapes,
    tiling_for,
)
from slimgrad.methods.loss.cut_tiles import RunningSum, Tiling, accumulate, gradient_buffers
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness


@component(
    Column.TEMPORARIES,
    Exactness.EXACT,
    Paper(
        "Distilling the Knowledge in a Neural Network",
        "Geoffrey Hinton, Oriol Vinyals, Jeff Dean",
        2015,
        "1503.02531",
    ),
)
def cut_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    token_block: int = TOKEN_BLOCK,
    vocab_block: int = VOCAB_BLOCK,
) -> Tensor:
    """``T^2 KL(teacher || student)`` of two linear layers' softmax, a mean over tokens; differentiable in the student.

    ``hidden`` is ``[..., D]``, ``weight`` ``[V, D]``, ``teacher_hidden`` ``[..., E]``, ``teacher_weight`` ``[V, E]``;
    tokens where the boolean ``mask`` ``[...]`` is False do not count. A scalar, or ``[...]`` with
    ``reduction="none"``. Raises ``MethodError`` for shapes that do not belong together.
    """
    check_shapes(hidden, weight, bias)
    check_shapes(teacher_hidden, teacher_weight, teacher_bias)
    if teacher_hidden.shape[:-1] != hidden.shape[:-1] or len(teacher_weight) != len(weight):
        raise MethodError(
            f"expected a teacher of the same tokens and classes, found {tuple(hidden.shape[:-1])} and "
            f"{tuple(teacher_hidden.shape[:-1])}, {len(weight)} and {len(teacher_weight)}"
        )
    if not temperature > 0:
        raise MethodError(f"expected a temperature above 0, found {temperature}")
    if reduction not in ("mean", "sum", "none"):
        raise MethodError(f"expected reduction 'mean', 'sum' or 'none', found {reduction!r}")
    tiling = tiling_for(hidden, 1 / temperature, None, None, token_block, vocab_block, "torch")
    rows = (t.reshape(-1, t.shape[-1]) for t in (hidden, teacher_hidden.detach()))
    x_ND, y_NE = rows
    fixed = (teacher_weight.detach(), None if teacher_bias is None else teacher_bias.detach())
    loss_N: Tensor = _Divergence.apply(x_ND, weight, bias, y_NE, *fixed, tiling)  # pyright: ignore[reportAssignmentType]
    loss_N = loss_N * temperature**2
    if mask is not None:
        loss_N = loss_N.masked_fill(~mask.reshape(-1), 0.0)
    if reduction == "none":
        return loss_N.view(hidden.shape[:-1])
    total = loss_N.sum()
    return total if reduction == "sum" else total / (len(loss_N) if mask is None else mask.sum())


class _Divergence(torch.autograd.Function):
    """The divergence of each token, ``[N]``, of logits already divided by the temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor | None,
        y_NE: Tensor,
        u_VE: Tensor,
        c_V: Tensor | None,
        tiling: Tiling,
    ) -> Tensor:
        student = RunningSum(len(x_ND), x_ND, tiling.work_dtype)
        teacher = RunningSum(len(x_ND), x_ND, tiling.work_dtype)
        apart_N = torch.zeros_like(student.sum_N)  # sum of exp(t - top) (t - z)
        with torch.autocast(x_ND.device.type, enabled=False):
            for classes in tiling.spans(len(w_VD), tiling.vocab_block):
                heads = (_part(w_VD, b_V, classes), _part(u_VE, c_V, classes))
                for rows in tiling.spans(len(x_ND), tiling.token_block):
                    z_CR, _ = tiling.tile(x_ND[rows], *heads[0])
                    t_CR, _ = tiling.tile(y_NE[rows], *heads[1])
                    apart_CR = t_CR - z_CR
                    student.add(rows, z_CR)
                    weight_CR, shrink_C = teacher.add(rows, t_CR)
                    apart_N[rows] = apart_N[rows] * shrink_C + (apart_CR * weight_CR).sum(1)
        lse_N, teacher_lse_N = student.lse(), teacher.lse()
        ctx.save_for_backward(x_ND, w_VD, b_V, y_NE, u_VE, c_V, lse_N, teacher_lse_N)
        ctx.tiling = tiling
        return apart_N / teacher.sum_N - teacher_lse_N + lse_N

    @staticmethod
    @single_backward("cut_distillation")
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        x_ND, w_VD, b_V, y_NE, u_VE, c_V, lse_N, teacher_lse_N = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        grads = gradient_buffers(x_ND, w_VD, b_V, ctx.needs_input_grad[:3], tiling.work_dtype)
        with torch.autocast(x_ND.device.type, enabled=False):
            for classes in tiling.spans(len(w_VD), tiling.vocab_block):
                heads = (_part(w_VD, b_V, classes), _part(u_VE, c_V, classes))
                w_RD, b_R = heads[0]
                sums = [
                    None if grad is None or part is None else torch.zeros_like(part, dtype=tiling.work_dtype)
                    for grad, part in ((grads.weight, w_RD), (grads.bias, b_R))
                ]  # fmt: skip
                for rows in tiling.spans(len(x_ND), tiling.token_block):
                    z_CR, _ = tiling.tile(x_ND[rows], *heads[0])
                    t_CR, _ = tiling.tile(y_NE[rows], *heads[1])
                    d_CR = z_CR.sub_(lse_N[rows].unsqueeze(1)).exp_()
                    d_CR -= t_CR.sub_(teacher_lse_N[rows].unsqueeze(1)).exp_()
                    d_CR *= grad_N[rows].unsqueeze(1)
                    d_CR = tiling.before_logits(d_CR, None)
                    accumulate(
                        grads, rows, d_CR, x_ND[rows], w_RD, sums[0], sums[1], tiling.matmul_dtype
                    )
                for grad, total in ((grads.weight, sums[0]), (grads.bias, sums[1])):
                    if grad is not None and total is not None:
                        grad[classes] = total.to(grad.dtype)
        grad_x = None if grads.hidden is None else grads.hidden.to(x_ND.dtype)
        return grad_x, grads.weight, grads.bias, None, None, None, None


def _part(weight: Tensor, bias: Tensor | None, classes: slice) -> tuple[Tensor, Tensor | None]:
    return weight[classes], None if bias is None else bias[classes]
