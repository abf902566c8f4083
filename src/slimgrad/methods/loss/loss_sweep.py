"""Cross-entropy of a linear layer's outputs, chunk by chunk over tokens, its gradient taken on the way.

Shapes: ``N`` tokens, ``D`` features, ``V`` classes (the vocabulary), ``C`` tokens of one chunk. Between chunks
one buffer of logits ``[C, V]`` is used again; no tensor of ``N x V`` elements exists at any time.

With ``z = x W^T + b`` and, where asked, ``z <- post * tanh(pre * z)``, a token's loss is

    (1 - eps) (logsumexp(z) - z_t) + eps (logsumexp(z) - mean(z))

and its gradient in ``z`` is ``softmax(z) - (1 - eps) onehot(t) - eps / V``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph
from torch._subclasses.fake_tensor import FakeTensor

from slimgrad.errors import UnsupportedError
from slimgrad.single_backward import without_second

Reduction = Literal["mean", "sum"]
_ROWS = 4096
"""Classes whose low-precision weight gradient is formed at a time before it is added in float32."""


@dataclass(frozen=True)
class Rule:
    """How logits become a loss. ``post`` is None where there is no ``tanh``."""

    logits_dtype: torch.dtype
    loss_dtype: torch.dtype
    chunk_size: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    pre: float = 1.0
    post: float | None = None
    reduction: Reduction = "mean"

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of softmax and sums: at least float32, as inside torch's own kernels."""
        wide = torch.promote_types(self.logits_dtype, self.loss_dtype)
        return torch.promote_types(wide, torch.float32)


class _Sweep:
    """One pass over the chunks: buffers, allocated once, and the gradients that are asked for."""

    def __init__(
        self, x_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, rule: Rule, needs: tuple[bool, ...]
    ) -> None:
        self.rule = rule
        self.work = rule.work_dtype
        self.x_ND, self.w_VD = x_ND.to(rule.logits_dtype), w_VD.to(rule.logits_dtype)
        self.b_V = None if b_V is None else b_V.to(rule.logits_dtype)
        num_rows, num_classes = min(rule.chunk_size, x_ND.shape[0]), w_VD.shape[0]

        def buffer(dtype: torch.dtype) -> Tensor:
            return x_ND.new_empty((num_rows, num_classes), dtype=dtype)

        any_gradient = any(needs)
        self.low_CV = buffer(rule.logits_dtype)
        self.z_CV = self.low_CV if self.work == rule.logits_dtype else buffer(self.work)
        keeps_tanh = rule.post is not None and any_gradient
        self.tanh_CV = buffer(self.work) if keeps_tanh else None
        self.grad_x_ND = self.x_ND.new_empty(x_ND.shape) if needs[0] else None
        self.grad_w_VD = torch.zeros_like(w_VD, dtype=self._sum_dtype(w_VD)) if needs[1] else None
        self.grad_b_V = (
            torch.zeros_like(b_V, dtype=self.work) if b_V is not None and needs[2] else None
        )

    def _sum_dtype(self, w_VD: Tensor) -> torch.dtype:
        # many chunks summed in a low precision would lose what plain autograd's single product keeps
        return torch.promote_types(
            torch.promote_types(w_VD.dtype, self.rule.logits_dtype), torch.float32
        )

    def logits(self, rows: slice) -> Tensor:
        """The logits of ``rows``, ``[C, V]`` in the working dtype; the buffer belongs to the caller until next time."""
        x_CD = self.x_ND[rows]
        low_CV, z_CV = self.low_CV[: x_CD.shape[0]], self.z_CV[: x_CD.shape[0]]
        if self.b_V is None:
            torch.mm(x_CD, self.w_VD.t(), out=low_CV)
        else:
            torch.addmm(self.b_V, x_CD, self.w_VD.t(), out=low_CV)
        if self.z_CV is not self.low_CV:
            z_CV.copy_(low_CV)
        if self.rule.pre != 1.0:
            z_CV.mul_(self.rule.pre)
        if self.rule.post is not None:
            z_CV.tanh_()
            if self.tanh_CV is not None:
                self.tanh_CV[: x_CD.shape[0]].copy_(z_CV)
            z_CV.mul_(self.rule.post)
        return z_CV

    def loss_in_place(self, z_CV: Tensor, t_C1: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token, ``[C]``, and the row sums ``[C, 1]`` of ``z_CV``, which becomes ``exp(z - max)``."""
        eps = self.rule.label_smoothing
        z_CV.sub_(z_CV.amax(1, keepdim=True))
        aim_C1 = z_CV.gather(1, t_C1)
        if eps:
            aim_C1 = (1 - eps) * aim_C1 + eps * z_CV.mean(1, keepdim=True)
        sum_C1 = z_CV.exp_().sum(1, keepdim=True)
        return (sum_C1.log() - aim_C1).squeeze(1), sum_C1

    def gradient_in_place(
        self, exp_CV: Tensor, sum_C1: Tensor, t_C1: Tensor, share_C1: Tensor
    ) -> Tensor:
        """Turn ``exp(z - max)`` into the gradient in the linear layer's output, in the dtype of the logits."""
        eps, rule = self.rule.label_smoothing, self.rule
        num_rows, num_classes = exp_CV.shape
        scale = rule.pre * (1.0 if rule.post is None else rule.post)
        share_C1 = share_C1 * scale
        exp_CV.mul_(share_C1 / sum_C1)
        exp_CV.scatter_add_(1, t_C1, share_C1 * (eps - 1))
        if eps:
            exp_CV.sub_(share_C1 * (eps / num_classes))
        if self.tanh_CV is not None:
            tanh_CV = self.tanh_CV[:num_rows]
            torch.ops.aten.tanh_backward.grad_input(exp_CV, tanh_CV, grad_input=exp_CV)
        if self.z_CV is self.low_CV:
            return exp_CV
        return self.low_CV[:num_rows].copy_(exp_CV)

    def accumulate(self, rows: slice, grad_CV: Tensor) -> None:
        """Add what the chunk gives to each gradient that is asked for."""
        if self.grad_x_ND is not None:
            torch.mm(grad_CV, self.w_VD, out=self.grad_x_ND[rows])
        if self.grad_b_V is not None:
            self.grad_b_V.add_(grad_CV.sum(0, dtype=self.work))
        if self.grad_w_VD is None:
            return
        if self.grad_w_VD.dtype == grad_CV.dtype:
            self.grad_w_VD.addmm_(grad_CV.t(), self.x_ND[rows])
            return
        for start in range(0, grad_CV.shape[1], _ROWS):
            part_CR = grad_CV[:, start : start + _ROWS]
            self.grad_w_VD[start : start + _ROWS].add_(part_CR.t() @ self.x_ND[rows])


def _sweep(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    target_N: Tensor,
    rule: Rule,
    needs: tuple[bool, ...],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The loss, and the gradients of it in ``x_ND``, ``w_VD`` and ``b_V`` where needed."""
    sweep = _Sweep(x_ND, w_VD, b_V, rule, needs)
    valid_N = target_N != rule.ignore_index
    safe_N1 = target_N.masked_fill(~valid_N, 0).unsqueeze(1)
    num_valid = valid_N.sum()
    share_N1 = valid_N.to(sweep.work).unsqueeze(1)
    if rule.reduction == "mean":
        share_N1 = share_N1 / num_valid.clamp(min=1)
    loss_N = x_ND.new_zeros(target_N.shape, dtype=sweep.work)
    for start in range(0, x_ND.shape[0], rule.chunk_size):
        rows = slice(start, start + rule.chunk_size)
        z_CV = sweep.logits(rows)
        loss_N[rows], sum_C1 = sweep.loss_in_place(z_CV, safe_N1[rows])
        if any(needs):
            grad_CV = sweep.gradient_in_place(z_CV, sum_C1, safe_N1[rows], share_N1[rows])
            sweep.accumulate(rows, grad_CV)
    loss = loss_N.masked_fill_(~valid_N, 0.0).sum()
    if rule.reduction == "mean":
        loss = loss / num_valid
    sources = (x_ND, w_VD, b_V)
    sums = (sweep.grad_x_ND, sweep.grad_w_VD, sweep.grad_b_V)
    grads = tuple(
        None if total is None or source is None else total.to(source.dtype)
        for total, source in zip(sums, sources, strict=True)
    )
    return loss.to(rule.loss_dtype), grads


class LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients in the forward pass; backward only hands the gradients over."""

    @staticmethod
    def forward(  # noqa: D102 - torch's own name
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        b_V: Tensor | None,
        target_N: Tensor,
        rule: Rule,
        needs: tuple[bool, ...],
        links: tuple[Tensor | None, ...],
    ) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            loss, grads = _sweep(x_ND, w_VD, b_V, target_N, rule, needs)
        # not save_for_backward: a gradient is nobody's activation, so hooks on saved tensors must not
        # compress or move it, and the only reference to it is given away in backward
        ctx.grads, ctx.links = grads, links
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad_loss,) = grad_outputs
        if ctx.grads is None:
            raise UnsupportedError(
                "the gradients of this chunked loss were given away by its first backward pass: expected one "
                "backward pass, found a second; pass retain_graph=True to the first"
            )
        nothing = (None,) * (len(ctx.needs_input_grad) - len(ctx.grads))
        if _get_current_graph_task_keep_graph():
            scaled = [None if g is None else g * grad_loss.detach() for g in ctx.grads]
            return (*without_second("the chunked loss", scaled, ctx.links), *nothing)
        grads, ctx.grads, ctx.links = list(ctx.grads), None, None
        if _may_differ_from_one(grad_loss):
            grads = [None if g is None else g.mul_(grad_loss) for g in grads]
        return (*grads, *nothing)


def _may_differ_from_one(grad_loss: Tensor) -> bool:
    # elsewhere than on the CPU, looking would wait for the device
    if grad_loss.device.type != "cpu" or isinstance(grad_loss, FakeTensor):
        return True
    return grad_loss.item() != 1.0
