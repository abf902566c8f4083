"""Triton kernels that pack codes of 1, 2, 3 and 4 bits into bytes and take them out again.

The plain twin is ``coding/bits``, which also says how they lie. One program makes a tile of one block's bytes, or of
its codes. The full blocks are one launch and the last, shorter one another; codes of 3 bits are packed as codes of 2
bits and of 1 bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _pack(codes, out, width, num_codes, code_step, byte_step, BITS: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """One program ``T`` bytes of a block: byte ``j`` of codes ``j``, ``j + width``, ..."""
    block = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * T + tl.arange(0, T)
    total = tl.zeros((T,), dtype=tl.int32)
    for place in tl.static_range(8 // BITS):
        c = place * width + j
        inside = (j < width) & (c < num_codes)
        code = tl.load(codes + block * code_step + c, mask=inside, other=0).to(tl.int32)
        total |= ((code >> SHIFT) & (2**BITS - 1)) << (BITS * place)
    tl.store(out + block * byte_step + j, total.to(tl.uint8), mask=j < width)


@triton.jit
def _unpack(packed, out, width, num_codes, code_step, byte_step, BITS: tl.constexpr, SHIFT: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """One program ``T`` codes of a block; those that lie above others (``SHIFT``) are added to them."""
    block = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * T + tl.arange(0, T)
    inside = c < num_codes
    byte = tl.load(packed + block * byte_step + c % width, mask=inside, other=0).to(tl.int32)
    code = ((byte >> (BITS * (c // width))) & (2**BITS - 1)) << SHIFT
    at = out + block * code_step + c
    if SHIFT > 0:
        code |= tl.load(at, mask=inside, other=0).to(tl.int32)
    tl.store(at, code.to(tl.uint8), mask=inside)


def pack_by_kernel(codes: Tensor, bits: int, out: Tensor, block: int) -> None:
    """``codes``, ``[n]`` of an integer dtype, into the bytes ``out``; of 3 bits only a multiple of 8 codes."""
    for first, begin, num_blocks, num_codes in _launches(len(codes), bits, block):
        for width, layer_begin, layer, shift in _layers(num_codes, bits):
            _pack[(num_blocks, triton.cdiv(width, TILE))](
                codes[first:], out[begin + layer_begin :], width, num_codes, block,
                block * bits // 8, layer, shift, TILE,
            )  # fmt: skip


def unpack_by_kernel(packed: Tensor, bits: int, out: Tensor, block: int) -> None:
    """The codes of ``packed`` into ``out``, uint8 ``[n]``; of 3 bits only a multiple of 8 codes."""
    for first, begin, num_blocks, num_codes in _launches(len(out), bits, block):
        for width, layer_begin, layer, shift in _layers(num_codes, bits):
            _unpack[(num_blocks, triton.cdiv(num_codes, TILE))](
                packed[begin + layer_begin :], out[first:], width, num_codes, block,
                block * bits // 8, layer, shift, TILE,
            )  # fmt: skip


def _launches(num_codes: int, bits: int, block: int) -> Iterator[tuple[int, int, int, int]]:
    """First code, first byte, blocks, and codes of each: the full blocks, and the last where it is shorter."""
    full = num_codes // block
    if full:
        yield 0, 0, full, block
    if num_codes % block:
        yield full * block, full * block * bits // 8, 1, num_codes % block


def _layers(num_codes: int, bits: int) -> tuple[tuple[int, int, int, int], ...]:
    """Bytes, the first of them within a block, bits that they hold of each code, and from which bit on."""
    if bits == 3:
        return (num_codes // 4, 0, 2, 0), (num_codes // 8, num_codes // 4, 1, 2)
    return ((-(-num_codes * bits // 8), 0, bits, 0),)
