"""Causal attention over factorised patterns, strided or fixed: n sqrt(n) scores in place of n^2.

Formula: out_i = sum over j in A_i of softmax_j(scale q_i k_j) v_j, with A_i a factor or the union of both:
    strided: {j: i - l <= j <= i} and {j <= i: (i - j) mod l = 0}
    fixed: {j <= i: j div l = i div l} and {j <= i: j mod l >= l - c}
Memory: activations hold at most n (2 l + n/l) scores a head, strided, and n (l + c n/l), fixed: with the stride l =
    sqrt(n) that is n^1.5, which the ledger's bytes follow. Scores are made from blocks and transposed blocks: no tensor of n x n elements exists, the mask included. With ``recompute`` none
    is kept between forward and backward; the peak of one layer alone is the same.
    Time: that of the products that are left; recomputation adds the forward pass of the attention.
Exactness: different from dense attention, whose model it replaces by another. It equals dense attention under the
    same mask up to rounding, outputs and gradients; with ``recompute`` gradients have the same bits.
Limits: causal self-attention, one key/value head for each query head, no dropout on probabilities. A query that may
    attend to nothing, as the first l - c under the second fixed factor alone, gives zeros. Any length: it is padded to
    whole strides. Whether the pattern fits the data is for the data to say: strided for what has rows (images,
    audio), fixed for text, says the paper. On the bytes of Python's documentation (144 a sequence, stride 12,
    two layers of width 48, 500 steps) a model takes 3.01 bits a byte with either
    pattern, 3.16 with dense attention and 3.38 with none; longer training was not tried.
References: Child, Gray, Radford and Sutskever, Generating Long Sequences with Sparse Transformers, arXiv 1904.10509:
    section 4.2 (factors), 4.3 (``merged``: one head over both; ``heads``: half of the heads each; ``first`` and ``second``:
    to alternate between layers), 5.4 (recomputation). *departs:* plain batched products over blocks in place of
    block-sparse kernels, so that some scores are computed and masked; heads share one set of summary tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from slimgrad.errors import MethodError
from slimgrad.layers.sparse_patterns import (
    EveryStride,
    Factor,
    OwnBlock,
    Summaries,
    Window,
    attend,
)
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness

Pattern: TypeAlias = Literal["strided", "fixed"]
Part: TypeAlias = Literal["merged", "heads", "first", "second"]


@component(
    Column.ACTIVATIONS,
    Exactness.DIFFERENT,
    Paper(
        "Generating Long Sequences with Sparse Transformers",
        "Rewon Child, Scott Gray, Alec Radford and Ilya Sutskever",
        2019,
        "1904.10509",
    ),
)
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern = "strided",
    part: Part = "merged",
    stride: int | None = None,
    summary: int = 1,
    scale: float | None = None,
    recompute: bool = False,
) -> Tensor:
    """Attention of each token to the tokens before it that the pattern names.

    ``query`` and ``key`` are ``[B, H, N, D]``, ``value`` ``[B, H, N, E]``; the result is ``[B, H, N, E]``. ``stride`` is the square
    root of the length, rounded up, unless given; ``summary`` is how many tokens at the end of each stride the fixed
    pattern sees from everywhere. ``part`` is ``"merged"`` (one softmax over both factors), ``"heads"`` (the first half of
    the heads the first factor, the others the second), or one factor alone.

    Raises ``MethodError`` for shapes that do not fit together and options out of bounds.

    >>> v = torch.eye(6)[None, None]
    >>> sparse_attention(torch.zeros(1, 1, 6, 2), torch.zeros(1, 1, 6, 2), v, stride=2)[0, 0, 5].tolist()
    [0.0, 0.25, 0.0, 0.25, 0.25, 0.25]
    """
    _check_shapes(query, key, value)
    length = query.shape[2]
    stride = math.isqrt(max(0, length - 1)) + 1 if stride is None else stride
    _check_options(pattern, part, stride, summary, query.shape[1])
    if length == 0:
        return query.new_empty(value.shape)
    factor = 1 / math.sqrt(max(1, query.shape[3])) if scale is None else scale
    q, k, v = (_in_blocks(t, stride) for t in (query, key, value))
    first, second, merged = _factors(pattern, summary)
    run = _recomputed if recompute and torch.is_grad_enabled() else attend
    if part == "heads":
        halves = query.shape[1] // 2
        low = run(q[:, :halves], k[:, :halves], v[:, :halves], first, factor)
        high = run(q[:, halves:], k[:, halves:], v[:, halves:], second, factor)
        out = torch.cat([low, high], 1)
    else:
        out = run(q, k, v, {"first": first, "second": second, "merged": merged}[part], factor)
    return out.flatten(2, 3)[:, :, :length]


_Factors: TypeAlias = tuple[Factor, ...]


def _factors(pattern: Pattern, summary: int) -> tuple[_Factors, _Factors, _Factors]:
    """The first factor, the second, and both without what they share."""
    if pattern == "strided":
        return (Window(),), (EveryStride(),), (Window(), EveryStride(beyond=2))
    own = OwnBlock()
    return (own,), (Summaries(summary),), (own, Summaries(summary, is_beyond=True))


def _recomputed(q: Tensor, k: Tensor, v: Tensor, factors: _Factors, scale: float) -> Tensor:
    run: Callable[..., Tensor] = checkpoint
    return run(attend, q, k, v, factors, scale, use_reentrant=False, preserve_rng_state=False)


def _in_blocks(whole: Tensor, stride: int) -> Tensor:
    """``[B, H, N, x]`` as ``[B, H, R, l, x]``, with zeros after the end: no query before it sees them."""
    missing = -whole.shape[2] % stride
    padded = functional.pad(whole, (0, 0, 0, missing)) if missing else whole
    return padded.unflatten(2, (-1, stride))


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if (
        query.dim() != 4
        or value.dim() != 4
        or shapes[0] != shapes[1]
        or shapes[0][:3] != shapes[2][:3]
    ):
        raise MethodError(
            "expected query and key [B, H, N, D] and value [B, H, N, E] of one sequence, found "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )


def _check_options(pattern: str, part: str, stride: int, summary: int, num_heads: int) -> None:
    if pattern not in ("strided", "fixed"):
        raise MethodError(f"expected pattern 'strided' or 'fixed', found {pattern!r}")
    if part not in ("merged", "heads", "first", "second"):
        raise MethodError(f"expected part 'merged', 'heads', 'first' or 'second', found {part!r}")
    if stride < 1 or not 1 <= summary <= stride:
        raise MethodError(
            f"expected a stride of at least 1 and a summary from 1 to the stride, found {stride} and {summary}"
        )
    if part == "heads" and num_heads % 2:
        raise MethodError(f"expected an even number of heads to split in two, found {num_heads}")
