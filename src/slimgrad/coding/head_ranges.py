"""8-bit codes with running ranges: the range of a head is remembered from step to step, not found anew.

Formula: of each head, the least element ``b`` and the width ``r`` of the range move by ``b <- m b + (1 - m) min x``,
    ``r <- m r + (1 - m) (max x - min x)``, from the first tensor's own on; ``x`` has the code ``clip(round((x - b) 255 / r))``
    and is decoded to ``b + c r / 255``. Rounding is stochastic or to the nearest.
Memory: a byte an element and two numbers a head; in float32, those in force when the tensor was encoded.
Exactness: approximate: what lies outside of the running range is clipped to it, so that stochastic rounding is unbiased
    only within.
Limits: the number of channels is a multiple of ``heads``. A tensor with another number of ranges than the one before
    begins anew: nothing is remembered of those.
References: Pan et al., Mesa, arXiv 2111.11124: head-wise quantisation, and running estimates of the ranges with momentum
    0.9; stochastic rounding. *departs:* a tensor keeps the range that it was encoded with, so that later updates of the
    place's range do not change what is decoded; both moves are of at least float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from slimgrad.code import Use
from slimgrad.coding.bits import BLOCK
from slimgrad.coding.draws import Draws
from slimgrad.coding.memory_order import Form
from slimgrad.errors import MethodError, UnsupportedError

TOP = 255


@dataclass(frozen=True, eq=False)
class HeadRangesCode:
    """Keeps a byte an element, with a running range for each of ``heads``.

    A tensor of shape ``(batch, heads, tokens, size)`` has one for each entry of its second dimension where that is
    ``heads``; every other tensor has one for each of ``heads`` equal groups of its last dimension (1: for the layer).
    Where ``heads`` is 0 the tensor says how many: the size of the second dimension of four, otherwise as many as there
    are groups of ``group_size`` in the last one, where those fill it (else, or with ``group_size`` 0: one).
    The ranges are the state of the place that this code belongs to.
    """

    heads: int = 1
    group_size: int = 0
    momentum: float = 0.9
    stochastic: bool = True
    seed: int = 0
    draws: Draws = field(init=False, repr=False)
    _ranges: list[Tensor] = field(default_factory=list[Tensor], init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.heads, self.group_size) < 0 or not 0 <= self.momentum < 1:
            raise MethodError(
                "expected heads and group_size at least 0 and momentum in [0, 1), "
                f"found {self.heads}, {self.group_size} and {self.momentum}"
            )
        object.__setattr__(self, "draws", Draws(self.seed))

    @property
    def ranges(self) -> Tensor | None:
        """``[2, heads]``: the least element and the width of each range; None before the first tensor."""
        return self._ranges[0] if self._ranges else None

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> HeadRangesEncoded:
        """The codes of ``tensor``. Raises UnsupportedError for other dtypes, or channels that heads do not divide."""
        if not tensor.dtype.is_floating_point:
            raise UnsupportedError(f"expected a floating-point tensor, found {tensor.dtype}")
        form, heads = Form.of(tensor), self.heads or self._heads_of(tensor)
        codes = torch.empty_strided(form.size, form.stride, dtype=torch.uint8, device=form.device)
        x_BHT, codes_BHT = by_heads(tensor.detach(), heads), by_heads(codes, heads)
        dtype = reckoned_in(tensor.dtype)
        ranges_2H = self._moved(x_BHT) if tensor.numel() else self.ranges
        if ranges_2H is None:
            ranges_2H = torch.zeros(2, heads, dtype=dtype, device=tensor.device)
        elif not is_fake(tensor):  # a trace has no values to be remembered
            self._ranges[:] = [ranges_2H]
        generator = self.draws.on(tensor.device) if self.stochastic else None
        low, width = (each.view(beside(x_BHT)) for each in ranges_2H)
        inverse = torch.where(width > 0, TOP / width, 0.0)
        for x, into in blocks(x_BHT, codes_BHT):
            scaled = x.to(dtype, copy=True).sub_(low).mul_(inverse)
            if generator:
                scaled.add_(torch.empty_like(scaled).uniform_(generator=generator)).floor_()
            else:
                scaled.round_()
            into.copy_(scaled.clamp_(0, TOP))
        return HeadRangesEncoded(codes, ranges_2H, form, heads)

    def num_bytes(self, use: Use) -> int:
        """Bytes of codes and ranges; where ``heads`` is 0, of those that a tensor of rows as they were made has."""
        heads = self.heads or self._groups_in(use.row)
        return use.num_elements + 2 * heads * reckoned_in(use.torch_dtype).itemsize

    def _heads_of(self, tensor: Tensor) -> int:
        if tensor.dim() == 4:
            return tensor.shape[1]
        return self._groups_in(tensor.shape[-1]) if tensor.dim() > 1 else 1

    def _groups_in(self, channels: int) -> int:
        fits = self.group_size and channels and not channels % self.group_size
        return channels // self.group_size if fits else 1

    def _moved(self, x_BHT: Tensor) -> Tensor:
        others = [place for place in range(x_BHT.dim()) if place != 1]
        low_H, high_H = x_BHT.amin(others), x_BHT.amax(others)
        seen_2H = torch.stack((low_H, high_H)).to(reckoned_in(x_BHT.dtype))
        seen_2H[1].sub_(seen_2H[0])
        if self.ranges is None or self.ranges.shape != seen_2H.shape:
            return seen_2H
        return self.ranges.to(seen_2H).lerp(seen_2H, 1 - self.momentum)


@dataclass(frozen=True)
class HeadRangesEncoded:
    """Bytes in the form of the tensor, and the ranges that they are of, ``[2, heads]``."""

    codes: Tensor
    ranges: Tensor
    form: Form
    heads: int

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and ranges."""
        return self.codes.nbytes + self.ranges.nbytes

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The tensor, what was outside of a range at its end."""
        out = self.form.empty()
        out_BHT, codes_BHT = by_heads(out, self.heads), by_heads(self.codes, self.heads)
        low, width = (each.view(beside(out_BHT)) for each in self.ranges)
        for part, codes in blocks(out_BHT, codes_BHT):
            part.copy_(codes.to(self.ranges.dtype).mul_(width / TOP).add_(low))
        return out


def by_heads(tensor: Tensor, heads: int) -> Tensor:
    """``[B, H, ...]``: a view with the heads second."""
    if tensor.dim() == 4 and tensor.shape[1] == heads:
        return tensor
    channels = tensor.shape[-1] if tensor.dim() else 1
    if channels % heads:
        raise UnsupportedError(
            f"expected channels that {heads} heads divide, found shape {tuple(tensor.shape)}"
        )
    if tensor.dim() < 2:
        return tensor.view(1, heads, -1)
    return tensor.unflatten(-1, (heads, channels // heads)).movedim(-2, 1)


def beside(tensor_BHT: Tensor) -> tuple[int, ...]:
    """The shape in which a number for each head stands beside the elements."""
    return (1, -1, *(1 for _ in tensor_BHT.shape[2:]))


def blocks(*tensors_BHT: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape cut alike into parts of about ``BLOCK`` elements, each with all heads."""
    first = tensors_BHT[0]
    if not first.numel():
        return
    of_sample = first[0].numel()
    samples = max(1, BLOCK // of_sample)
    length = max(1, BLOCK * first.shape[2] // of_sample)
    for parts in zip(*(each.split(samples) for each in tensors_BHT), strict=True):
        yield from zip(*(each.split(length, 2) for each in parts), strict=True)


def reckoned_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ranges and codes before they are rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32
