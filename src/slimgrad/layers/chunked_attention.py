"""The sweep over tiles as one differentiable function that saves its inputs, its output and the log-sum-exp.

Shapes as in ``attention_sweep``, with ``H`` = ``K G`` query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimgrad.layers.attention_sweep import KeySide, Rule, Sums, work_dtype
from slimgrad.layers.single_backward import without_second

_TILE_ELEMENTS = {"cpu": 2**18}
_TILE_ELEMENTS_ELSEWHERE = 2**24
"""Scores made at a time, over samples and heads: what the cache of a core holds, and what fills a GPU."""


class ChunkedAttention(torch.autograd.Function):
    """Attention of ``q_BHND`` to ``k_BKMD`` and ``v_BKME``; ``bias`` and ``mask`` are four-dimensional, 1 where broadcast."""

    @staticmethod
    def forward(  # noqa: D102 - torch's own name
        ctx: Any,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        rule: Rule,
    ) -> Tensor:
        (batch, num_heads, num_rows, _), num_groups = q_BHND.shape, k_BKMD.shape[1]
        # laid out as the projection that usually follows reads it
        out = q_BHND.new_empty(batch, num_rows, num_heads, v_BKME.shape[-1]).transpose(1, 2)
        lse = q_BHND.new_empty(batch, num_heads, num_rows, 1, dtype=work_dtype(q_BHND.dtype))
        q, o, z = (by_group(t, num_groups) for t in (q_BHND, out, lse))
        with torch.autocast(q_BHND.device.type, enabled=False):
            for part, side in _sides(k_BKMD, v_BKME, bias, mask, rule, q):
                for rows in _rows(num_rows, rule):
                    block, z[part][..., rows, :] = side.attend(
                        q[part][..., rows, :], rows, num_rows
                    )
                    o[part][..., rows, :] = block
        ctx.save_for_backward(q_BHND, k_BKMD, v_BKME, bias, mask, out, lse)
        ctx.rule = rule
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        (grad_out,) = grad_outputs
        saved = ctx.saved_tensors  # once: under a checkpoint each time is a recomputation
        q, k, v, bias, *_ = saved
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            grads = _gradients(saved, grad_out, ctx.rule, ctx.needs_input_grad[3])
        named = without_second("memory_efficient_attention", grads, (q, k, v, bias, grad_out))
        return (*named, None, None)


def _gradients(
    saved: tuple[Any, ...], grad_out: Tensor, rule: Rule, needs_bias: bool
) -> tuple[Tensor | None, ...]:
    q_BHND, k_BKMD, v_BKME, bias, mask, out, lse = saved
    work, num_rows, num_groups = lse.dtype, q_BHND.shape[2], k_BKMD.shape[1]
    grad_q = torch.empty_like(q_BHND)
    sums = Sums(
        torch.zeros_like(k_BKMD, dtype=work),
        torch.zeros_like(v_BKME, dtype=work),
        torch.zeros_like(bias, dtype=_sum_dtype(bias, q_BHND, work)) if needs_bias else None,
    )
    q, o, z, g, d = (by_group(t, num_groups) for t in (q_BHND, out, lse, grad_out, grad_q))
    for part, side in _sides(k_BKMD, v_BKME, bias, mask, rule, q):
        mine = Sums(sums.key[part], sums.value[part], _bias_part(sums.bias, part, num_groups))
        for rows in _rows(num_rows, rule):
            q_n, o_n, z_n, g_n = (t[part][..., rows, :] for t in (q, o, z, g))
            g_n = g_n.to(work)
            delta = (o_n * g_n).sum(-1, keepdim=True)
            d[part][..., rows, :] = side.pull_back(q_n, rows, num_rows, z_n, delta, g_n, mine)
    grad_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
    return grad_q, sums.key.to(k_BKMD.dtype), sums.value.to(v_BKME.dtype), grad_bias


def by_group(t_BHNx: Tensor, num_groups: int) -> Tensor:
    """``[B, H, N, x]`` seen as ``[B, K, G, N, x]``; a single head that is broadcast stays so."""
    if t_BHNx.shape[1] == 1:
        return t_BHNx.unsqueeze(1)
    return t_BHNx.unflatten(1, (num_groups, -1))


def _sum_dtype(bias: Tensor, q: Tensor, work: torch.dtype) -> torch.dtype:
    """The bias's own dtype where each entry is written once; many tiles summed in a low precision would lose."""
    num_rows_columns = bias.shape[0], bias.shape[1], bias.shape[2]
    once = num_rows_columns == (q.shape[0], q.shape[1], q.shape[2]) and bias.shape[3] > 1
    return bias.dtype if once else torch.promote_types(bias.dtype, work)


def _bias_part(whole: Tensor | None, part: tuple[slice, slice], num_groups: int) -> Tensor | None:
    if whole is None:
        return None
    grouped = by_group(whole, num_groups)
    samples, heads = (
        slice(None) if size == 1 else chosen
        for size, chosen in zip(grouped.shape[:2], part, strict=True)
    )
    return grouped[samples, heads]


def _sides(
    k_BKMD: Tensor,
    v_BKME: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    rule: Rule,
    q_BKGND: Tensor,
) -> Iterator[tuple[tuple[slice, slice], KeySide]]:
    """Samples and heads in parts whose tiles are small enough, each with its keys."""
    batch, num_groups, per_group, num_rows = q_BKGND.shape[:4]
    tile = per_group * min(rule.query_chunk, num_rows) * min(rule.key_chunk, k_BKMD.shape[2])
    limit = _TILE_ELEMENTS.get(q_BKGND.device.type, _TILE_ELEMENTS_ELSEWHERE)
    at_once = max(1, limit // max(1, tile))
    samples, heads = max(1, at_once // max(1, num_groups)), min(at_once, num_groups)
    starts = [(b, h) for b in range(0, batch, samples) for h in range(0, num_groups, heads)]
    for region, (b, h) in enumerate(starts):
        part = slice(b, b + samples), slice(h, h + heads)
        yield (
            part,
            KeySide(
                k_BKMD[part],
                v_BKME[part],
                rule,
                _bias_part(bias, part, num_groups),
                _bias_part(mask, part, num_groups),
                region,
            ),
        )


def _rows(num_rows: int, rule: Rule) -> Iterator[slice]:
    for start in range(0, num_rows, rule.query_chunk):
        yield slice(start, min(start + rule.query_chunk, num_rows))
