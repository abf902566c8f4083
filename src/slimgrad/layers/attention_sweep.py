"""Softmax attention tile by tile: a running softmax forward, scores made again backward.

Shapes: ``B`` samples, ``K`` key/value heads, ``G`` query heads for each of them, ``N`` queries, ``M`` keys, ``D``
width of queries and keys, ``E`` width of values; ``P`` = ``B K``. A tile is the scores of some queries (rows) and
some keys (columns). No tensor of ``N x M`` elements exists but those given: mask and bias.

With ``s = scale q k^T + bias``, hidden entries at -inf, a row's output is ``sum_j exp(s_j - lse) v_j``,
``lse = log sum_j exp(s_j)``. Forward, the largest score and both sums so far are carried from tile to tile. Backward,
``p = exp(s - lse)`` is made again, and with ``delta = grad_out . out`` the gradient in the scores is
``p (grad_out v^T - delta)``; under dropout ``p`` is multiplied by its mask for the output, and so is ``grad_out v^T``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_EVERYTHING = slice(None)


@dataclass(frozen=True)
class Rule:
    """How queries attend. ``seed`` is that of the first tile's dropout mask; chunks are in queries and keys.

    ``scale`` is 1/sqrt(D) where it is None.
    """

    scale: float | None
    query_chunk: int
    key_chunk: int
    dropout_p: float = 0.0
    is_causal: bool = False
    seed: int = 0


class Sums(NamedTuple):
    """Where a backward pass adds gradients: of keys ``[B, K, M, D]``, values ``[B, K, M, E]``, and the bias."""

    key: Tensor
    value: Tensor
    bias: Tensor | None = None


class KeySide:
    """Keys, values, bias and mask of some heads of some samples: what a block of queries attends to.

    ``key`` is ``[B, K, M, D]``, ``value`` ``[B, K, M, E]``; ``bias`` (added) and ``mask`` (True: attend) are
    ``[B, K, G, N, M]`` with 1 where they are broadcast. ``region`` tells apart the dropout of several.
    """

    def __init__(
        self,
        key: Tensor,
        value: Tensor,
        rule: Rule,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        region: int = 0,
    ) -> None:
        self.k_BKMD, self.v_BKME, self.bias, self.mask = key, value, bias, mask
        self.rule, self.region = rule, region
        self.work = work_dtype(key.dtype)
        self.scale = max(1, key.shape[-1]) ** -0.5 if rule.scale is None else rule.scale
        self._generator: torch.Generator | None = None

    def attend(self, q_BKGND: Tensor, rows: slice, num_rows: int) -> tuple[Tensor, Tensor]:
        """Outputs ``[B, K, G, n, E]`` and log-sum-exp ``[B, K, G, n, 1]`` of the queries ``rows`` of ``num_rows``.

        Both are in the working dtype. A row that may attend to nothing gives zeros, and a log-sum-exp of +inf, so
        that its probabilities are zero in the backward pass too.
        """
        lead = q_BKGND.shape[:-1]
        q_PRD = _flat(q_BKGND.to(self.work) * self.scale)
        out_PRE = q_PRD.new_zeros(*q_PRD.shape[:2], self.v_BKME.shape[-1])
        sum_PR1 = q_PRD.new_zeros(*q_PRD.shape[:2], 1)
        top_PR1, base_PR1 = torch.full_like(sum_PR1, -math.inf), sum_PR1
        for columns in self._columns(rows):
            s_PRM = self._scores(q_PRD, lead, rows, columns)
            top_before, top_PR1 = top_PR1, torch.maximum(top_PR1, s_PRM.amax(-1, keepdim=True))
            base_PR1 = top_PR1.masked_fill(top_PR1 == -math.inf, 0.0)
            fade_PR1 = (top_before - base_PR1).exp_()
            s_PRM.sub_(base_PR1).exp_()
            sum_PR1.mul_(fade_PR1).add_(s_PRM.sum(-1, keepdim=True))
            if self.rule.dropout_p:
                s_PRM.mul_(self._kept(s_PRM, rows, columns, num_rows))
            out_PRE.mul_(fade_PR1).baddbmm_(s_PRM, self._part(self.v_BKME, columns))
        empty_PR1 = sum_PR1 == 0
        out_PRE.div_(sum_PR1.masked_fill(empty_PR1, 1.0))
        lse_PR1 = sum_PR1.log_().add_(base_PR1).masked_fill_(empty_PR1, math.inf)
        return out_PRE.view(*lead, -1), lse_PR1.view(*lead, 1)

    def pull_back(
        self,
        q_BKGND: Tensor,
        rows: slice,
        num_rows: int,
        lse_BKGN1: Tensor,
        delta_BKGN1: Tensor,
        grad_BKGNE: Tensor,
        sums: Sums,
    ) -> Tensor:
        """The gradient in the queries ``rows``, ``[B, K, G, n, D]``; those in keys, values and bias are added to ``sums``.

        ``delta`` is the sum over ``E`` of output times its gradient ``grad``.
        """
        lead = q_BKGND.shape[:-1]
        q_PRD, g_PRE = _flat(q_BKGND.to(self.work) * self.scale), _flat(grad_BKGNE)
        lse_PR1, delta_PR1 = _flat(lse_BKGN1), _flat(delta_BKGN1)
        grad_q_PRD = torch.zeros_like(q_PRD)
        for columns in self._columns(rows):
            k_PMD, v_PME = self._part(self.k_BKMD, columns), self._part(self.v_BKME, columns)
            p_PRM = self._scores(q_PRD, lead, rows, columns).sub_(lse_PR1).exp_()
            ds_PRM = torch.bmm(g_PRE, v_PME.mT)
            if self.rule.dropout_p:
                kept_PRM = self._kept(p_PRM, rows, columns, num_rows)
                ds_PRM.mul_(kept_PRM).sub_(delta_PR1).mul_(p_PRM)
                p_PRM.mul_(kept_PRM)
            else:
                ds_PRM.sub_(delta_PR1).mul_(p_PRM)
            self._add(sums.value, columns, torch.bmm(p_PRM.mT, g_PRE))
            self._add(sums.key, columns, torch.bmm(ds_PRM.mT, q_PRD))
            if sums.bias is not None:
                target = cut(sums.bias, rows, columns)
                target.add_(ds_PRM.view(*lead, -1).sum_to_size(target.shape))
            grad_q_PRD.baddbmm_(ds_PRM, k_PMD)
        return grad_q_PRD.mul_(self.scale).view(*lead, -1)

    def _columns(self, rows: slice) -> Iterator[slice]:
        num_keys = self.k_BKMD.shape[2]
        stop = min(num_keys, rows.stop) if self.rule.is_causal else num_keys
        for start in range(0, stop, self.rule.key_chunk):
            yield slice(start, min(start + self.rule.key_chunk, stop))

    def _part(self, whole: Tensor, columns: slice) -> Tensor:
        part = whole[:, :, columns].to(self.work)
        return part.reshape(-1, *part.shape[2:])

    def _add(self, total: Tensor, columns: slice, part: Tensor) -> None:
        target = total[:, :, columns]
        target.add_(part.view(target.shape))

    def _scores(self, q_PRD: Tensor, lead: torch.Size, rows: slice, columns: slice) -> Tensor:
        s_PRM = torch.bmm(q_PRD, self._part(self.k_BKMD, columns).mT)
        s_BKGNM = s_PRM.view(*lead, -1)
        if self.bias is not None:
            s_BKGNM.add_(cut(self.bias, rows, columns))
        if self.mask is not None:
            s_BKGNM.masked_fill_(~cut(self.mask, rows, columns), -math.inf)
        if self.rule.is_causal and columns.stop > rows.start + 1:
            i_N1 = torch.arange(rows.start, rows.stop, device=s_PRM.device).unsqueeze(1)
            later_NM = torch.arange(columns.start, columns.stop, device=s_PRM.device) > i_N1
            s_BKGNM.masked_fill_(later_NM, -math.inf)
        return s_PRM

    def _kept(self, tile: Tensor, rows: slice, columns: slice, num_rows: int) -> Tensor:
        """The tile's dropout mask over the probability of being kept: the same whenever it is asked for."""
        rule = self.rule
        if self._generator is None:
            self._generator = torch.Generator(tile.device)
        down, across = -(-num_rows // rule.query_chunk), -(-self.k_BKMD.shape[2] // rule.key_chunk)
        row, column = rows.start // rule.query_chunk, columns.start // rule.key_chunk
        number = (self.region * down + row) * across + column
        self._generator.manual_seed((rule.seed + number) % 2**63)
        keep = 1.0 - rule.dropout_p
        drawn = torch.empty_like(tile).bernoulli_(keep, generator=self._generator)
        return drawn.div_(keep) if keep else drawn


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores and sums: at least float32, as inside torch's own kernels."""
    return torch.promote_types(dtype, torch.float32)


def cut(whole: Tensor, rows: slice, columns: slice) -> Tensor:
    """The part of a mask or bias ``[..., N, M]`` for a tile; a dimension of size 1 stays whole."""
    rows = _EVERYTHING if whole.shape[-2] == 1 else rows
    return whole[..., rows, _EVERYTHING if whole.shape[-1] == 1 else columns]


def _flat(block: Tensor) -> Tensor:
    """``[B, K, G, n, x]`` as ``[B K, G n, x]``: the heads that share keys are rows of one matrix."""
    return block.reshape(block.shape[0] * block.shape[1], -1, block.shape[-1])
