"""Codes of 1, 2, 3 and 4 bits packed into bytes: exactly ``ceil(n * bits / 8)`` of them.

Codes are packed in blocks, each on its own. A block of ``m`` codes is cut into ``8 / bits`` *planes*, one after the
other, and byte ``j`` holds the ``j``-th code of each plane, the first plane in its lowest bits. Planes are contiguous,
so that packing and unpacking are a few passes over whole vectors. Codes of 3 bits are their lower two bits, packed as
codes of 2 bits, and then their upper bits, packed as codes of 1 bit; what is left over of a last block by division
by 8 is packed code after code, the first in the lowest bits.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from slimgrad.errors import MethodError

BLOCK = 2**17  # codes; the scratch of one is smaller than 1 MiB
WIDTHS = (1, 2, 3, 4)


def packed_bytes(num_codes: int, bits: int) -> int:
    """Bytes of ``num_codes`` codes of ``bits`` bits (8 are bytes already)."""
    return -(-num_codes * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes``, ``[n]`` of an integer dtype and each below ``2**bits``, as uint8 ``[packed_bytes(n, bits)]``."""
    _check(bits)
    out = codes.new_empty(packed_bytes(len(codes), bits), dtype=torch.uint8)
    if by_kernel(codes):
        pack_on_device(codes, bits, out)
        return out
    scratch = codes.new_empty(min(len(codes), BLOCK), dtype=torch.int16)
    for start in range(0, len(codes), BLOCK):
        block = codes[start : start + BLOCK]
        first = packed_bytes(start, bits)
        into = out[first : first + packed_bytes(len(block), bits)]
        pack_block(scratch[: len(block)].copy_(block), bits, into)
    return out


def unpack(packed: Tensor, num_codes: int, bits: int) -> Tensor:
    """The ``num_codes`` codes of ``bits`` bits that ``pack`` made ``packed`` of, as uint8."""
    _check(bits)
    out = packed.new_empty(num_codes, dtype=torch.uint8)
    if by_kernel(packed):
        unpack_on_device(packed, bits, out)
        return out
    scratch = packed.new_empty(min(num_codes, BLOCK), dtype=torch.int16)
    for start in range(0, num_codes, BLOCK):
        block = out[start : start + BLOCK]
        first = packed_bytes(start, bits)
        made = scratch[: len(block)]
        unpack_block(packed[first : first + packed_bytes(len(block), bits)], bits, made)
        block.copy_(made)
    return out


def pack_on_device(codes: Tensor, bits: int, out: Tensor) -> None:
    """``pack`` by Triton, into ``out``."""
    from slimgrad.kernels.bit_packing import pack_by_kernel

    whole = _whole(len(codes), bits)
    pack_by_kernel(codes[:whole], bits, out, BLOCK)
    if whole < len(codes):
        _pack_rest(codes[whole:], out[packed_bytes(whole, bits) :])


def unpack_on_device(packed: Tensor, bits: int, out: Tensor) -> None:
    """``unpack`` by Triton, into ``out``, uint8."""
    from slimgrad.kernels.bit_packing import unpack_by_kernel

    whole = _whole(len(out), bits)
    unpack_by_kernel(packed, bits, out[:whole], BLOCK)
    if whole < len(out):
        _unpack_rest(packed[packed_bytes(whole, bits) :], out[whole:])


def pack_block(codes: Tensor, bits: int, out: Tensor) -> None:
    """One block's ``codes`` (int16, at most ``BLOCK``; overwritten) into the bytes ``out``."""
    if bits != 3:
        _pack_planes(codes, bits, out)
        return
    whole = _whole(len(codes), bits)
    high = codes[:whole] >> 2
    _pack_planes(codes[:whole].bitwise_and_(3), 2, out[: whole // 4])
    _pack_planes(high, 1, out[whole // 4 : whole // 8 * 3])
    if whole < len(codes):
        _pack_rest(codes[whole:], out[whole // 8 * 3 :])


def unpack_block(packed: Tensor, bits: int, out: Tensor) -> None:
    """The inverse of ``pack_block``; ``out`` is of any dtype of at least two bytes."""
    if bits != 3:
        _unpack_planes(packed, bits, out)
        return
    whole = _whole(len(out), bits)
    _unpack_planes(packed[: whole // 4], 2, out[:whole])
    high = torch.empty_like(out[:whole])
    _unpack_planes(packed[whole // 4 : whole // 8 * 3], 1, high)
    out[:whole].add_(high, alpha=4)
    if whole < len(out):
        _unpack_rest(packed[whole // 8 * 3 :], out[whole:])


def _pack_rest(codes: Tensor, out: Tensor) -> None:
    """Fewer than 8 codes of 3 bits, one after the other."""
    shift = 3 * torch.arange(len(codes), device=codes.device)
    number = (codes.long() << shift).sum(0, keepdim=True)
    out.copy_(number.view(torch.uint8)[: len(out)])


def _unpack_rest(packed: Tensor, out: Tensor) -> None:
    """The inverse of ``_pack_rest``."""
    shift = 8 * torch.arange(len(packed), device=packed.device)
    number = (packed.long() << shift).sum(0, keepdim=True)
    out.copy_((number >> 3 * torch.arange(len(out), device=out.device)) & 7)


def by_kernel(tensor: Tensor) -> bool:
    """Whether Triton packs where ``tensor`` is."""
    return tensor.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def _pack_planes(codes: Tensor, bits: int, out: Tensor) -> None:
    width = len(out)
    total = codes[:width]
    for place in range(1, 8 // bits):
        plane = codes[place * width : (place + 1) * width]
        total[: len(plane)].add_(plane, alpha=1 << bits * place)
    out.copy_(total)


def _unpack_planes(packed: Tensor, bits: int, out: Tensor) -> None:
    width, mask = len(packed), 2**bits - 1
    for place in range(8 // bits):
        plane = out[place * width : (place + 1) * width]
        plane.copy_(packed[: len(plane)] & mask << bits * place)
        if place and out.is_floating_point():  # shifts of short integers are slow on CPUs
            plane.mul_(2.0 ** -(bits * place))
        elif place:
            plane.bitwise_right_shift_(bits * place)


def _whole(num_codes: int, bits: int) -> int:
    """Codes that are packed in planes."""
    return num_codes - num_codes % 8 if bits == 3 else num_codes


def _check(bits: int) -> None:
    if bits not in WIDTHS:
        raise MethodError(f"expected codes of 1, 2, 3 or 4 bits, found {bits}")
