"""Triton kernels for group-wise uniform codes: the range and the codes of a group, and the group again from them.

The plain twin, and the formula, is ``coding/group_codes``. One program encodes or decodes one group, in float32; a code
takes a whole byte (``bit_packing`` packs them). Stochastic rounding draws Triton's own counter-based numbers, so
that a group's do not depend on the order of programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _encode(x, codes, lo_out, hi_out, first, seed, width, tiny, top, STOCHASTIC: tl.constexpr, G: tl.constexpr):  # fmt: skip
    """One program a group: its ends, and a code for each element."""
    group = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, G)
    inside = j < width
    at = group * width + j
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    lo = tl.min(tl.where(inside, value, float("inf")), 0)
    hi = tl.max(tl.where(inside, value, float("-inf")), 0)
    is_nan = tl.max(tl.where(inside & (value != value), 1, 0), 0) > 0  # comparisons pass NaN over
    lo = tl.where(is_nan, float("nan"), lo)
    tl.store(lo_out + group, lo)
    tl.store(hi_out + group, hi)
    scaled = (value - lo) * (top / tl.maximum(hi - lo, tiny))
    if STOCHASTIC:
        scaled += tl.rand(seed, first + at)
    else:
        scaled += 0.5
    scaled = tl.where(scaled == scaled, scaled, 0.0)  # a group with NaN has an end that says so
    tl.store(codes + at, scaled.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def _decode(codes, lo_in, hi_in, out, width, tiny, top, G: tl.constexpr):
    """One program a group."""
    group = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, G)
    inside = j < width
    at = group * width + j
    lo = tl.load(lo_in + group).to(tl.float32)
    hi = tl.load(hi_in + group).to(tl.float32)
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    value = code * (tl.maximum(hi - lo, tiny) / top) + lo
    tl.store(out + at, value, mask=inside)


def encode_by_kernel(
    x_RG: Tensor,
    codes: Tensor,
    lo_R: Tensor,
    hi_R: Tensor,
    bits: int,
    seed: int | None,
    first: int = 0,
) -> None:
    """The ends of each row into ``lo_R`` and ``hi_R``, a byte for each element into ``codes``.

    Codes are the nearest without a ``seed``; ``first`` is the place of the rows in the stream of random numbers.
    """
    num_groups, width = x_RG.shape
    tiny, top = _limits(bits)
    _encode[(num_groups,)](
        x_RG, codes, lo_R, hi_R, first, seed or 0, width, tiny, top, seed is not None,
        triton.next_power_of_2(width),
    )  # fmt: skip


def decode_by_kernel(codes: Tensor, lo_R: Tensor, hi_R: Tensor, out_RG: Tensor, bits: int) -> None:
    """The elements of each row of ``out_RG`` from their ``codes``."""
    num_groups, width = out_RG.shape
    tiny, top = _limits(bits)
    _decode[(num_groups,)](
        codes, lo_R, hi_R, out_RG, width, tiny, top, triton.next_power_of_2(width)
    )


def _limits(bits: int) -> tuple[float, float]:
    info = torch.finfo(torch.float32)
    return info.tiny * 2**10, (2**bits - 1) * (1 - 2 * info.eps)
