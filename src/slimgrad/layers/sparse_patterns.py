"""The factors of sparse attention: which keys a query sees, and scores of those keys alone.

Shapes: ``B`` samples, ``H`` heads, ``D`` width; ``R`` blocks of ``l`` tokens (``l`` is the stride), so that token
``i`` is row ``i mod l`` of block ``i div l``; ``S`` keys that a row is scored with. Each factor makes scores
``[B, H, R, l, S]`` from queries and keys ``[B, H, R, l, D]``, tells which of them are allowed, and mixes values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional


class Factor(Protocol):
    """One set of keys for each query, all at or before it."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of queries with the keys of this factor, ``[B, H, R, l, S]``."""
        ...

    def allowed(self, num_blocks: int, stride: int, device: torch.device) -> Tensor:
        """Which of the scores count: booleans that broadcast to ``[R, l, S]``."""
        ...

    def mix(self, p: Tensor, v: Tensor) -> Tensor:
        """Values weighted by ``p`` of ``[B, H, R, l, S]``: ``[B, H, R, l, E]``."""
        ...


class Window:
    """The query's own token and the ``l`` before it: a block sees itself and the one before."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # noqa: D102
        return q @ _with_previous(k).mT

    def allowed(self, num_blocks: int, stride: int, device: torch.device) -> Tensor:  # noqa: D102
        row, column = _rows(stride, device), torch.arange(2 * stride, device=device)
        block = torch.arange(num_blocks, device=device).view(-1, 1, 1)
        return (column >= row) & (column <= row + stride) & ((block > 0) | (column >= stride))

    def mix(self, p: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return p @ _with_previous(v)


@dataclass(frozen=True)
class EveryStride:
    """Every ``l``-th token before the query; not those within ``beyond`` blocks, which another factor has."""

    beyond: int = 0

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # noqa: D102
        return (q.transpose(2, 3) @ k.transpose(2, 3).mT).transpose(2, 3)

    def allowed(self, num_blocks: int, stride: int, device: torch.device) -> Tensor:  # noqa: D102
        block = torch.arange(num_blocks, device=device)
        return (block.view(-1, 1) - block >= self.beyond).unsqueeze(1)

    def mix(self, p: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return (p.transpose(2, 3) @ v.transpose(2, 3)).transpose(2, 3)


class OwnBlock:
    """The tokens of the query's own block, up to itself."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # noqa: D102
        return q @ k.mT

    def allowed(self, num_blocks: int, stride: int, device: torch.device) -> Tensor:  # noqa: D102
        return torch.arange(stride, device=device) <= _rows(stride, device)

    def mix(self, p: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return p @ v


@dataclass(frozen=True)
class Summaries:
    """The last ``summary`` tokens of every block, up to the query; of earlier blocks alone where ``is_beyond``."""

    summary: int
    is_beyond: bool = False

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # noqa: D102
        products = q.flatten(2, 3) @ self._columns(k).mT
        return products.unflatten(2, q.shape[2:4])

    def allowed(self, num_blocks: int, stride: int, device: torch.device) -> Tensor:  # noqa: D102
        block = torch.arange(num_blocks, device=device)
        within = torch.arange(stride - self.summary, stride, device=device)
        key = (block.view(-1, 1) * stride + within).flatten()
        query = (block.view(-1, 1) * stride + torch.arange(stride, device=device)).unsqueeze(-1)
        return key < block.view(-1, 1, 1) * stride if self.is_beyond else key <= query

    def mix(self, p: Tensor, v: Tensor) -> Tensor:  # noqa: D102
        return (p.flatten(2, 3) @ self._columns(v)).unflatten(2, p.shape[2:4])

    def _columns(self, blocks: Tensor) -> Tensor:
        return blocks[:, :, :, -self.summary :].flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, factors: tuple[Factor, ...], scale: float) -> Tensor:
    """Attention of blocks ``[B, H, R, l, D]`` over all keys of ``factors`` together, in one softmax.

    A query that may attend to nothing gives zeros.
    """
    (num_blocks, stride), q = q.shape[2:4], q * scale
    scores = [factor.scores(q, k) for factor in factors]
    sizes = [part.shape[-1] for part in scores]
    allowed = torch.cat(
        [
            factor.allowed(num_blocks, stride, q.device).expand(num_blocks, stride, size)
            for factor, size in zip(factors, sizes, strict=True)
        ],
        -1,
    )
    whole = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    # a finite filling: rows of -inf alone would make the softmax, and every gradient, NaN
    p = whole.masked_fill(~allowed, torch.finfo(whole.dtype).min).softmax(-1)
    if not _every_row_sees(factors):
        p = p.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    parts = zip(factors, p.split(sizes, -1), strict=True)
    first, *others = (factor.mix(part, v) for factor, part in parts)
    return sum(others, first)


def _every_row_sees(factors: tuple[Factor, ...]) -> bool:
    # all but the summaries hold the query itself
    return any(not isinstance(factor, Summaries) for factor in factors)


def _rows(stride: int, device: torch.device) -> Tensor:
    return torch.arange(stride, device=device).unsqueeze(1)


def _with_previous(blocks: Tensor) -> Tensor:
    """Each block after the one before it, ``[B, H, R, 2 l, x]``; zeros before the first."""
    before = functional.pad(blocks[:, :, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([before, blocks], -2)
