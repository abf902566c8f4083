"""Group-wise uniform codes: a step and an offset for each group of elements that follow each other in memory.

Formula: a group with least element ``m`` and largest ``M`` has the step ``s = (M - m) / B``, ``B = 2^bits - 1``, and
    an element ``x`` the code ``c = floor((x - m) / s + u)`` with ``u = 1/2`` (nearest), or ``u`` uniform in [0, 1)
    (stochastic: then ``E[c] = (x - m) / s``). It is decoded to ``m + c s``.
Memory: ``bits / 8`` bytes an element and two numbers a group. These are ``m`` and ``M`` themselves in the tensor's own
    dtype: as elements of the tensor they are exact in it, so that no value is clipped and a group far from zero loses
    nothing; in a shorter dtype they would have to be rounded outwards. At the default group of 256 they take 1/128 of
    what the tensor does.
Exactness: at most half a step off, or with stochastic rounding less than a step and unbiased; both up to rounding to
    the dtype of the tensor.
Limits: NaN or infinity in a group makes all of it NaN, and so does a range beyond the largest float.
References: Chen et al., ActNN, arXiv 2104.14129, section 4.1 (per-group quantisation; groups of 256); Liu et al., GACT,
    arXiv 2206.11357. *departs:* both keep the step and the offset in bfloat16; here the ends of the range in the
    tensor's own dtype.
"""

# Shapes: N elements of a tensor, R groups (rows) of G elements, K codes of a block.

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimgrad.code import Use
from slimgrad.coding.bits import (
    BLOCK,
    by_kernel,
    pack_block,
    pack_on_device,
    packed_bytes,
    unpack_block,
    unpack_on_device,
)
from slimgrad.coding.draws import Draws
from slimgrad.coding.memory_order import Form, in_memory_order
from slimgrad.errors import MethodError, UnsupportedError

SPAN = 8 * BLOCK  # elements whose groups' ends are found in one go


@dataclass(frozen=True)
class GroupCode:
    """Keeps ``bits`` bits an element (8, 4 or 2) and a range for each ``group`` of elements in the order of memory.

    With ``stochastic`` rounding the code draws from a generator of its own, which starts from ``seed``.
    """

    bits: int = 8
    group: int = 256
    stochastic: bool = False
    seed: int = 0
    draws: Draws = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise MethodError(f"expected 2, 4 or 8 bits, found {self.bits}")
        if not 8 <= self.group <= BLOCK or BLOCK % self.group:
            raise MethodError(f"expected group a power of 2 from 8 to {BLOCK}, found {self.group}")
        object.__setattr__(self, "draws", Draws(self.seed))

    def encode(self, tensor: Tensor) -> GroupEncoded:
        """The codes of ``tensor``. Raises UnsupportedError where it is not of a real floating dtype."""
        if not tensor.dtype.is_floating_point:
            raise UnsupportedError(f"expected a floating-point tensor, found {tensor.dtype}")
        x_N = in_memory_order(tensor)
        codes = x_N.new_empty(packed_bytes(len(x_N), self.bits), dtype=torch.uint8)
        ranges_2R = x_N.new_empty(2, num_groups(len(x_N), self.group))
        encoded = GroupEncoded(codes, ranges_2R, Form.of(tensor), self.bits, self.group)
        if suits_kernel(x_N, self.group):
            encode_on_device(x_N, encoded, self.draws.number() if self.stochastic else None)
        else:
            _encode(x_N, encoded, self.draws.on(x_N.device) if self.stochastic else None)
        return encoded

    def num_bytes(self, use: Use) -> int:
        """Bytes of codes and ranges."""
        ranges = 2 * num_groups(use.num_elements, self.group) * use.torch_dtype.itemsize
        return packed_bytes(use.num_elements, self.bits) + ranges


@dataclass(frozen=True)
class GroupEncoded:
    """Packed codes, and the least and the largest element of each group."""

    codes: Tensor
    ranges: Tensor
    form: Form
    bits: int
    group: int

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and ranges."""
        return self.codes.nbytes + self.ranges.nbytes

    def decode(self) -> Tensor:
        """The tensor, each element a whole number of steps above the least of its group."""
        out = self.form.empty()
        flat_N = in_memory_order(out)
        if suits_kernel(flat_N, self.group):
            decode_on_device(self, flat_N)
        else:
            _decode(self, flat_N)
        return out

    def spans(self, flat_N: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Groups that follow each other, their codes, and their ends: at most ``SPAN`` elements at a time.

        These are ``[R, G]`` of ``flat_N``, bytes, and ``[2, R, 1]``. What is left over is a last, shorter group.
        """
        whole = len(flat_N) // self.group * self.group
        begin = packed_bytes(whole, self.bits)
        ends_2R1 = self.ranges.unsqueeze(2)
        if whole:
            yield from zip(
                flat_N[:whole].view(-1, self.group).split(SPAN // self.group),
                self.codes[:begin].split(packed_bytes(SPAN, self.bits)),
                ends_2R1[:, : whole // self.group].split(SPAN // self.group, 1),
                strict=True,
            )
        if whole < len(flat_N):
            yield flat_N[whole:].unsqueeze(0), self.codes[begin:], ends_2R1[:, -1:]

    def blocks(
        self, values_RG: Tensor, codes: Tensor, *of_groups_R1: Tensor
    ) -> Iterator[tuple[Tensor, ...]]:
        """A span cut into blocks of codes: elements, codes, and what else there is of their groups."""
        width = values_RG.shape[1]
        rows = max(1, BLOCK // width)
        yield from zip(
            values_RG.split(rows),
            codes.split(packed_bytes(rows * width, self.bits)),
            *(each.split(rows) for each in of_groups_R1),
            strict=True,
        )


def num_groups(num_elements: int, group: int) -> int:
    """Groups, the last of which may be shorter."""
    return -(-num_elements // group)


def suits_kernel(flat_N: Tensor, group: int) -> bool:
    """Whether Triton's programs, which reckon in float32 and hold a whole group, do it."""
    return by_kernel(flat_N) and flat_N.dtype != torch.float64 and group <= 2**12


def encode_on_device(x_N: Tensor, into: GroupEncoded, seed: int | None) -> None:
    """Fill ``into`` by Triton; codes are the nearest where ``seed`` is None."""
    from slimgrad.kernels.group_quantization import encode_by_kernel

    first, bits = 0, into.bits
    bytes_S = x_N.new_empty(0 if bits == 8 else min(len(x_N), SPAN), dtype=torch.uint8)
    for x_RG, packed, ends_2R1 in into.spans(x_N):
        codes = packed if bits == 8 else bytes_S[: x_RG.numel()]
        lo_R, hi_R = ends_2R1.squeeze(2)
        encode_by_kernel(x_RG, codes, lo_R, hi_R, bits, seed, first)
        first += x_RG.numel()
        if bits < 8:
            pack_on_device(codes, bits, packed)


def decode_on_device(encoded: GroupEncoded, out_N: Tensor) -> None:
    """Fill ``out_N`` by Triton."""
    from slimgrad.kernels.group_quantization import decode_by_kernel

    bits = encoded.bits
    bytes_S = out_N.new_empty(0 if bits == 8 else min(len(out_N), SPAN), dtype=torch.uint8)
    for out_RG, packed, ends_2R1 in encoded.spans(out_N):
        codes = packed if bits == 8 else bytes_S[: out_RG.numel()]
        if bits < 8:
            unpack_on_device(packed, bits, codes)
        lo_R, hi_R = ends_2R1.squeeze(2)
        decode_by_kernel(codes, lo_R, hi_R, out_RG, bits)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which codes of a tensor of ``dtype`` are reckoned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widths(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, float]:
    """``(w, B)`` of groups with these ends: their step is ``w / B``.

    ``B`` is smaller by two roundings, so that ``(x - m) B / w + u`` stays below ``2^bits`` for every ``u`` below 1;
    a width of zero is the smallest whose inverse is finite.
    """
    info = torch.finfo(lo.dtype)
    return (hi - lo).clamp_(min=info.tiny * 2**10), (2**bits - 1) * (1 - 2 * info.eps)


@torch.no_grad()
def _encode(x_N: Tensor, into: GroupEncoded, generator: torch.Generator | None) -> None:
    bits, dtype, size = into.bits, working_dtype(x_N.dtype), min(len(x_N), BLOCK)
    scaled_K, whole_K = x_N.new_empty(size, dtype=dtype), x_N.new_empty(size, dtype=torch.int16)
    noise = Noise(scaled_K, generator) if generator else None
    for x_RG, codes, ends_2R1 in into.spans(x_N):
        lo_R1, hi_R1 = x_RG.amin(1, keepdim=True), x_RG.amax(1, keepdim=True)
        torch.stack((lo_R1, hi_R1), out=ends_2R1)
        lo_R1, hi_R1 = lo_R1.to(dtype), hi_R1.to(dtype)
        width_R1, top = widths(lo_R1, hi_R1, bits)
        if noise is None:
            lo_R1.sub_(width_R1, alpha=0.5 / top)
        for part, packed, low, inverse in into.blocks(x_RG, codes, lo_R1, top / width_R1):
            whole = whole_K[: part.numel()]
            scaled = scaled_K[: part.numel()].view(part.shape)
            values = part if part.dtype == dtype else scaled.copy_(part)
            torch.sub(values, low, out=scaled).mul_(inverse)
            if noise:
                noise.add_to(scaled.view(-1))
            whole.copy_(scaled.view(-1))  # cuts the fraction off; to bytes at once is slower
            if bits == 8:
                packed.copy_(whole)
            else:
                pack_block(whole, bits, packed)


@torch.no_grad()
def _decode(encoded: GroupEncoded, out_N: Tensor) -> None:
    bits, dtype = encoded.bits, working_dtype(out_N.dtype)
    is_direct = out_N.dtype == dtype
    scaled_K = out_N.new_empty(0 if is_direct else min(len(out_N), BLOCK), dtype=dtype)
    for out_RG, codes, ends_2R1 in encoded.spans(out_N):
        lo_R1, hi_R1 = ends_2R1.to(dtype)
        width_R1, top = widths(lo_R1, hi_R1, bits)
        for part, packed, low, step in encoded.blocks(out_RG, codes, lo_R1, width_R1.div_(top)):
            scaled = part if is_direct else scaled_K[: part.numel()].view(part.shape)
            if bits == 8:
                scaled.copy_(packed.view_as(part))
            else:
                unpack_block(packed, bits, scaled.view(-1))
            scaled.mul_(step).add_(low)
            if not is_direct:
                part.copy_(scaled)


class Noise:
    """Uniform numbers in [0, 1) for block after block.

    Each is made of 16 random bits of its own and of one uniform number a block below them, so that it is uniform to
    the last bit of a float for a quarter of the random bits.
    """

    def __init__(self, like_K: Tensor, generator: torch.Generator) -> None:
        self._generator = generator
        self._bits = like_K.new_empty(-(-len(like_K) // 4), dtype=torch.int64)
        self._noise_K = torch.empty_like(like_K)
        self._below = like_K.new_empty(())

    def add_to(self, values_K: Tensor) -> None:
        """Add the next numbers to ``values_K``, at most a block."""
        self._bits.random_(-(2**63), None, generator=self._generator)
        self._below.uniform_(generator=self._generator).mul_(2.0**-16).add_(0.5)
        noise_K = self._noise_K[: len(values_K)]
        noise_K.copy_(self._bits.view(torch.int16)[: len(values_K)])
        values_K.add_(noise_K, alpha=2.0**-16).add_(self._below)
