"""Triton kernels for the logits of a linear layer that are never stored: log-sum-exp, and the filtered gradient.

The plain twin is ``methods/loss/cut_tiles``. One program computes a tile of ``C`` tokens and ``R`` classes in
registers, from slices of ``B`` features. In backward a tile in which no probability reaches the filter, and no
target lies, ends before its two products; the others are added to float32 sums atomically, so the last bits depend
on the order in which they come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_C, BLOCK_R, BLOCK_B = 32, 64, 32


@triton.jit
def _logits(x, w, b, c, r, in_c, in_r, D, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """A tile's logits in float32, and the tanh that they are made of (or the logits again)."""
    z = tl.zeros((C, R), dtype=tl.float32)
    for start in range(0, D, B):
        d = start + tl.arange(0, B)
        in_d = d < D
        x_CB = tl.load(
            x + c[:, None] * D + d[None, :], mask=in_c[:, None] & in_d[None, :], other=0.0
        )
        w_RB = tl.load(
            w + r[:, None] * D + d[None, :], mask=in_r[:, None] & in_d[None, :], other=0.0
        )
        z += tl.dot(x_CB, tl.trans(w_RB), input_precision="ieee")
    if HAS_BIAS:
        z += tl.load(b + r, mask=in_r, other=0.0).to(tl.float32)[None, :]
    z = z * scale
    tanh = z
    if HAS_CAP:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0
        z = tanh * softcap
    return z, tanh


@triton.jit
def _forward(x, w, b, target, aim, lse, total, N, V, D, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_TOTAL: tl.constexpr, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """One program a block of tokens: over all classes, with a running maximum and sum."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    in_c = c < N
    t = tl.load(target + c, mask=in_c, other=-1)
    top = tl.full((C,), float("-inf"), dtype=tl.float32)
    total_C = tl.zeros((C,), dtype=tl.float32)
    aim_C = tl.zeros((C,), dtype=tl.float32)
    for start in range(0, V, R):
        r = start + tl.arange(0, R)
        in_r = r < V
        z, _ = _logits(x, w, b, c, r, in_c, in_r, D, scale, softcap, HAS_BIAS, HAS_CAP, C, R, B)
        if HAS_TOTAL:
            seen = tl.sum(tl.where(in_c[:, None], z, 0.0), 0)
            tl.atomic_add(total + r, seen, mask=in_r)
        aim_C += tl.sum(tl.where(r[None, :] == t[:, None], z, 0.0), 1)
        z = tl.where(in_r[None, :], z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 1))
        total_C = total_C * tl.exp(top - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        top = higher
    tl.store(aim + c, aim_C, mask=in_c)
    tl.store(lse + c, tl.log(total_C) + top, mask=in_c)


@triton.jit
def _backward(x, w, b, target, lse, order, g_aim, g_lse, dx, dw, db, skipped, N, V, D, scale, softcap, below, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ORDER: tl.constexpr, FOR_X: tl.constexpr, FOR_W: tl.constexpr, FOR_B: tl.constexpr, C: tl.constexpr, R: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """One program a tile."""
    c = tl.program_id(0) * C + tl.arange(0, C)
    place = tl.program_id(1) * R + tl.arange(0, R)
    in_c, in_r = c < N, place < V
    r = place
    if HAS_ORDER:
        r = tl.load(order + place, mask=in_r, other=0)
    z, tanh = _logits(x, w, b, c, r, in_c, in_r, D, scale, softcap, HAS_BIAS, HAS_CAP, C, R, B)
    inside = in_c[:, None] & in_r[None, :]
    p = tl.where(inside, tl.exp(z - tl.load(lse + c, mask=in_c, other=0.0)[:, None]), 0.0)
    is_aim = inside & (r[None, :] == tl.load(target + c, mask=in_c, other=-1)[:, None])
    if tl.max(tl.max(tl.where(is_aim, 1.0, p), 1), 0) < below:
        tl.atomic_add(skipped, 1)
        return
    g = tl.load(g_lse + c, mask=in_c, other=0.0)[:, None] * p
    g += tl.where(is_aim, tl.load(g_aim + c, mask=in_c, other=0.0)[:, None], 0.0)
    if HAS_CAP:
        g = g * (1.0 - tanh * tanh)
    g = g * scale
    if FOR_B:
        tl.atomic_add(db + r, tl.sum(g, 0), mask=in_r)
    for start in range(0, D, B):
        d = start + tl.arange(0, B)
        in_d = d < D
        if FOR_X:
            at = in_r[:, None] & in_d[None, :]
            w_RB = tl.load(w + r[:, None] * D + d[None, :], mask=at, other=0.0)
            part = tl.dot(g.to(w_RB.dtype), w_RB, input_precision="ieee")
            tl.atomic_add(
                dx + c[:, None] * D + d[None, :], part, mask=in_c[:, None] & in_d[None, :]
            )
        if FOR_W:
            at = in_c[:, None] & in_d[None, :]
            x_CB = tl.load(x + c[:, None] * D + d[None, :], mask=at, other=0.0)
            part = tl.dot(tl.trans(g).to(x_CB.dtype), x_CB, input_precision="ieee")
            tl.atomic_add(
                dw + r[:, None] * D + d[None, :], part, mask=in_r[:, None] & in_d[None, :]
            )


def lse_by_kernel(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    target_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    wants_total: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Each token's aim and log-sum-exp, ``[N]`` in float32, and on request each class's sum of logits, ``[V]``."""
    (num_tokens, width), num_classes = x_ND.shape, len(w_VD)
    aim_N = x_ND.new_empty(num_tokens, dtype=torch.float32)
    lse_N = torch.empty_like(aim_N)
    total_V = aim_N.new_zeros(num_classes) if wants_total else None
    _forward[(triton.cdiv(num_tokens, BLOCK_C),)](
        x_ND, w_VD, b_V, target_N, aim_N, lse_N, total_V, num_tokens, num_classes, width, scale,
        softcap or 1.0, b_V is not None, softcap is not None, wants_total, BLOCK_C, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    return aim_N, lse_N, total_V


def gradient_by_kernel(
    x_ND: Tensor,
    w_VD: Tensor,
    b_V: Tensor | None,
    target_N: Tensor,
    lse_N: Tensor,
    order_V: Tensor | None,
    g_aim_N: Tensor,
    g_lse_N: Tensor,
    needs: tuple[bool, ...],
    *,
    scale: float,
    softcap: float | None,
    filter_below: float,
) -> tuple[tuple[Tensor | None, Tensor | None, Tensor | None], int]:
    """The gradients in hidden states, weight and bias, in float32, and how many tiles were left out."""
    (num_tokens, width), num_classes = x_ND.shape, len(w_VD)
    dx = torch.zeros_like(x_ND, dtype=torch.float32) if needs[0] else None
    dw = torch.zeros_like(w_VD, dtype=torch.float32) if needs[1] else None
    db = torch.zeros_like(b_V, dtype=torch.float32) if needs[2] and b_V is not None else None
    skipped = torch.zeros(1, dtype=torch.int32, device=x_ND.device)
    grid = (triton.cdiv(num_tokens, BLOCK_C), triton.cdiv(num_classes, BLOCK_R))
    _backward[grid](
        x_ND, w_VD, b_V, target_N, lse_N, order_V, g_aim_N.contiguous(), g_lse_N.contiguous(), dx, dw, db,
        skipped, num_tokens, num_classes, width, scale, softcap or 1.0, filter_below, b_V is not None,
        softcap is not None, order_V is not None, dx is not None, dw is not None, db is not None,
        BLOCK_C, BLOCK_R, BLOCK_B,
    )  # fmt: skip
    return (dx, dw, db), int(skipped)
