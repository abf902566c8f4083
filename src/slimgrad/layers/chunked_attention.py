"""The sweep over tiles as one differentiable function that saves its inputs, its output and the log-sum-exp.

Shapes as in ``attention_sweep``, with ``H`` = ``K G`` query heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimgrad.layers.attention_sweep import KeySide, Rule, Sums, work_dtype
from slimgrad.single_backward import without_second

_TILE_ELEMENTS = {"cpu": 2**18}
_TILE_ELEMENTS_ELSEWHERE = 2**24
"""Scores made at a time, over samples and heads: what the cache of a core holds, and what fills a GPU."""


class TiledAttention:
    """Keys and values, ``[B, K, M, x]``, that blocks of ``num_rows`` queries of ``num_heads`` heads attend to.

    ``bias`` and ``mask`` are four-dimensional, 1 where broadcast. Samples and heads are taken in parts whose tiles
    are small enough.
    """

    def __init__(
        self,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        rule: Rule,
        num_heads: int,
        num_rows: int,
    ) -> None:
        self.k_BKMD, self.v_BKME, self.rule = k_BKMD, v_BKME, rule
        self.num_groups, self.num_rows = k_BKMD.shape[1], num_rows
        self.work = work_dtype(k_BKMD.dtype)
        self._sides = [
            (part, self._side(part, region, bias, mask))
            for region, part in enumerate(self._parts(num_heads))
        ]

    def rows(self) -> Iterator[slice]:
        """The blocks of queries, in order."""
        for start in range(0, self.num_rows, self.rule.query_chunk):
            yield slice(start, min(start + self.rule.query_chunk, self.num_rows))

    def attend(self, q_BHnD: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, H, n, E]`` in the dtype of the queries, and log-sum-exp ``[B, H, n, 1]``, of one block."""
        batch, heads, length, _ = q_BHnD.shape
        out = q_BHnD.new_empty(batch, length, heads, self.v_BKME.shape[-1]).transpose(1, 2)
        lse = q_BHnD.new_empty(batch, heads, length, 1, dtype=self.work)
        q, o, z = (by_group(t, self.num_groups) for t in (q_BHnD, out, lse))
        for part, side in self._sides:
            o[part], z[part] = side.attend(q[part], rows, self.num_rows)
        return out, lse

    def pull_back(
        self, q_BHnD: Tensor, rows: slice, out: Tensor, lse: Tensor, grad_out: Tensor, sums: Sums
    ) -> Tensor:
        """The gradient in one block's queries; those in keys, values and bias are added to ``sums``."""
        grad_q = torch.empty_like(q_BHnD)
        delta = (out * grad_out.to(self.work)).sum(-1, keepdim=True)
        q, z, g, d, e = (
            by_group(t, self.num_groups) for t in (q_BHnD, lse, grad_out, delta, grad_q)
        )
        for part, side in self._sides:
            bias = _part_of(sums.bias, part, self.num_groups)
            mine = Sums(sums.key[part], sums.value[part], bias)
            g_n = g[part].to(self.work)
            e[part] = side.pull_back(q[part], rows, self.num_rows, z[part], d[part], g_n, mine)
        return grad_q

    def sums(self, bias: Tensor | None = None) -> Sums:
        """Zeros for the gradients in keys and values, and in ``bias`` where it is given."""
        return Sums(
            torch.zeros_like(self.k_BKMD, dtype=self.work),
            torch.zeros_like(self.v_BKME, dtype=self.work),
            None if bias is None else torch.zeros_like(bias, dtype=self._sum_dtype(bias)),
        )

    def _side(
        self, part: tuple[slice, slice], region: int, bias: Tensor | None, mask: Tensor | None
    ) -> KeySide:
        bias, mask = (_part_of(t, part, self.num_groups) for t in (bias, mask))
        return KeySide(self.k_BKMD[part], self.v_BKME[part], self.rule, bias, mask, region)

    def _sum_dtype(self, bias: Tensor) -> torch.dtype:
        # many tiles summed in a low precision would lose what a single sum keeps
        written_once = bias.shape[0] == self.k_BKMD.shape[0] and min(bias.shape[1:]) > 1
        return bias.dtype if written_once else torch.promote_types(bias.dtype, self.work)

    def _parts(self, num_heads: int) -> Iterator[tuple[slice, slice]]:
        batch, num_groups, num_columns = self.k_BKMD.shape[:3]
        rule, per_group = self.rule, num_heads // max(1, num_groups)
        tile = per_group * min(rule.query_chunk, self.num_rows) * min(rule.key_chunk, num_columns)
        limit = _TILE_ELEMENTS.get(self.k_BKMD.device.type, _TILE_ELEMENTS_ELSEWHERE)
        at_once = max(1, limit // max(1, tile))
        samples, heads = max(1, at_once // max(1, num_groups)), min(at_once, max(1, num_groups))
        for b in range(0, batch, samples):
            for h in range(0, num_groups, heads):
                yield slice(b, b + samples), slice(h, h + heads)


class ChunkedAttention(torch.autograd.Function):
    """Attention of ``q_BHND`` to ``k_BKMD`` and ``v_BKME``; ``bias`` and ``mask`` as in ``TiledAttention``."""

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
        batch, heads, length, _ = q_BHND.shape
        # laid out as the projection that usually follows reads it
        out = q_BHND.new_empty(batch, length, heads, v_BKME.shape[-1]).transpose(1, 2)
        lse = q_BHND.new_empty(batch, heads, length, 1, dtype=work_dtype(q_BHND.dtype))
        with torch.autocast(q_BHND.device.type, enabled=False):
            attention = TiledAttention(k_BKMD, v_BKME, bias, mask, rule, heads, length)
            for rows in attention.rows():
                out[:, :, rows], lse[:, :, rows] = attention.attend(q_BHND[:, :, rows], rows)
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
    attention = TiledAttention(k_BKMD, v_BKME, bias, mask, rule, q_BHND.shape[1], q_BHND.shape[2])
    sums, grad_q = attention.sums(bias if needs_bias else None), torch.empty_like(q_BHND)
    for rows in attention.rows():
        q_n, o_n, z_n, g_n = (t[:, :, rows] for t in (q_BHND, out, lse, grad_out))
        grad_q[:, :, rows] = attention.pull_back(q_n, rows, o_n, z_n, g_n, sums)
    grad_bias = None if sums.bias is None else sums.bias.to(bias.dtype)
    return grad_q, sums.key.to(k_BKMD.dtype), sums.value.to(v_BKME.dtype), grad_bias


def by_group(t_BHnx: Tensor, num_groups: int) -> Tensor:
    """``[B, H, n, x]`` seen as ``[B, K, G, n, x]``; a single head that is broadcast stays so."""
    if t_BHnx.shape[1] == 1:
        return t_BHnx.unsqueeze(1)
    return t_BHnx.unflatten(1, (num_groups, -1))


def _part_of(whole: Tensor | None, part: tuple[slice, slice], num_groups: int) -> Tensor | None:
    if whole is None:
        return None
    grouped = by_group(whole, num_groups)
    samples, heads = (
        slice(None) if size == 1 else chosen
        for size, chosen in zip(grouped.shape[:2], part, strict=True)
    )
    return grouped[samples, heads]
