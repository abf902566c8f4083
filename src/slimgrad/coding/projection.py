"""Rows projected onto a few random directions, which are drawn again from a seed where they are needed.

Formula: a row ``x`` of width ``D`` is kept as ``z = x P`` and decoded to ``z P^T``, ``P`` of ``(D, R)`` with entries
    ``N(0, 1 / R)``, so that ``E[P P^T] = I``. Every tensor has a ``P`` of its own.
Memory: ``R / D`` of the tensor, ``R`` being ``ratio`` times ``D``, rounded, at least 1; ``P`` is never kept, and made in parts
    of 1 MiB in float32.
Exactness: unbiased, up to the rounding of ``P`` to the tensor's dtype: the mean of the decoded tensor is the tensor, and so
    that of every product with it. The squared error of a row is ``(D + 1) / R`` times its square norm in the mean.
Limits: for tensors that backward only multiplies by, as the input of a linear layer for its weight gradient; in nonlinear
    uses the mean of the decoded tensor says nothing.
References: Shamshoum et al., CompAct, arXiv 2410.15352: the projection and its seed. *departs:* the paper keeps one ``P`` for
    many updates and its optimizer works on ``g^T z``; here what comes back is as wide as the tensor was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimgrad.code import Use
from slimgrad.coding.draws import Draws
from slimgrad.coding.memory_order import Form, in_memory_order
from slimgrad.coding.velora import row_of
from slimgrad.errors import MethodError, UnsupportedError
from slimgrad.measuring.fake import is_fake

PART = 2**18  # entries of P that are made at once


@dataclass(frozen=True)
class ProjectionCode:
    """Keeps ``ratio`` of the width of the rows along a tensor's fastest dimension, in ``(0, 1]``.

    The seeds of its projections come from a generator of its own, which starts from ``seed``.
    """

    ratio: float = 0.25
    seed: int = 0
    draws: Draws = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise MethodError(f"expected ratio in (0, 1], found {self.ratio}")
        object.__setattr__(self, "draws", Draws(self.seed))

    @torch.no_grad()
    def encode(self, tensor: Tensor) -> ProjectedRows:
        """The projected rows of ``tensor``. Raises UnsupportedError where it is not of a real floating dtype."""
        if not tensor.dtype.is_floating_point:
            raise UnsupportedError(f"expected a floating-point tensor, found {tensor.dtype}")
        width = max(1, row_of(tensor))
        x_ND = in_memory_order(tensor).view(-1, width)
        z_NR = x_ND.new_empty(len(x_ND), rank_of(width, self.ratio))
        seed = 0 if is_fake(tensor) else self.draws.number()  # a trace has no values to be drawn
        for start, part_DB in _parts(x_ND, z_NR, seed):
            torch.mm(x_ND, part_DB, out=z_NR[:, start : start + part_DB.shape[1]])
        return ProjectedRows(z_NR, seed, width, Form.of(tensor))

    def num_bytes(self, use: Use) -> int:
        """Bytes of the projected rows."""
        if not use.num_elements:
            return 0
        num_rows = use.num_elements // use.row
        return num_rows * rank_of(use.row, self.ratio) * use.torch_dtype.itemsize


@dataclass(frozen=True)
class ProjectedRows:
    """Projected rows, ``[N, R]``, and the seed of what they were projected onto."""

    kept: Tensor
    seed: int
    width: int
    form: Form

    @property
    def num_bytes(self) -> int:
        """Bytes of the projected rows."""
        return self.kept.nbytes

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The rows as far as they lie along the directions, in the tensor's own form."""
        out = self.form.empty()
        x_ND = in_memory_order(out).view(-1, self.width)
        for start, part_DB in _parts(x_ND, self.kept, self.seed):
            z_NB = self.kept[:, start : start + part_DB.shape[1]]
            x_ND.addmm_(z_NB, part_DB.T, beta=1 if start else 0)
        return out


def rank_of(width: int, ratio: float) -> int:
    """``ratio`` of ``width``, rounded, at least 1."""
    return max(1, round(ratio * width))


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A random stream on ``device`` that starts from ``seed``."""
    return torch.Generator(device).manual_seed(seed)


def directions(
    size: tuple[int, int], rank: int, like: Tensor, generator: torch.Generator
) -> Tensor:
    """Entries ``N(0, 1 / rank)`` on the device and in the dtype of ``like``, drawn in float32 or wider."""
    wide = torch.promote_types(like.dtype, torch.float32)
    drawn = torch.randn(size, dtype=wide, device=like.device, generator=generator)
    return drawn.mul_(rank**-0.5).to(like.dtype)


def _parts(x_ND: Tensor, z_NR: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """The columns of P in order, some at a time, ``[D, B]``, and the number of the first of them."""
    (num_rows, width), rank = x_ND.shape, z_NR.shape[1]
    generator, step = seeded(seed, x_ND.device), max(1, PART // width)
    for start in range(0, rank if num_rows else 0, step):
        yield start, directions((width, min(step, rank - start)), rank, x_ND, generator)
