"""Derivatives that are step functions: kept as the number of a step, given back as a number that lies on it.

PyTorch's backward of an activation function ``f`` multiplies by ``f'(x)`` of the saved ``x`` (or by what it makes of a
saved output). Where it is given an ``x'`` with ``f'(x') = q(x)``, it multiplies by the level ``q(x)`` of the step
function ``q`` instead: ``x'`` is the *representative* of ``x``'s step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.coding.bits import BLOCK, pack_block, packed_bytes, unpack_block
from slimgrad.coding.memory_order import Form, in_memory_order
from slimgrad.errors import MethodError, UnsupportedError

FARTHEST = 40.0  # beyond it every derivative here is constant in float64


@dataclass(frozen=True)
class Activation:
    """An activation function, and what of it PyTorch saves for backward.

    ``slope`` makes of what was saved what backward multiplies by. ``center`` is the saved value about which the
    derivative is even, None where it is not.
    """

    forward: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    saves_output: bool = False
    center: float | None = None

    @property
    def is_even(self) -> bool:
        """Whether ``f'(-x) = f'(x)``."""
        return self.center is not None

    def derivative(self, x: Tensor) -> Tensor:
        """``f'(x)``, by PyTorch's own backward."""
        return self.slope(self.saved(x))

    def saved(self, x: Tensor) -> Tensor:
        """What backward is given for an input ``x``."""
        return self.forward(x) if self.saves_output else x


def _slope(backward: Any, *arguments: Any, **named: Any) -> Callable[[Tensor], Tensor]:
    return lambda kept: backward(torch.ones_like(kept), *arguments, kept, **named)


_aten: Any = torch.ops.aten
ACTIVATIONS = {
    "gelu": Activation(F.gelu, _slope(_aten.gelu_backward)),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"), _slope(_aten.gelu_backward, approximate="tanh")
    ),
    "silu": Activation(F.silu, _slope(_aten.silu_backward)),
    "selu": Activation(
        F.selu, _slope(_aten.elu_backward, 1.6732632423543772, 1.0507009873554805, 1.0, False)
    ),
    "elu": Activation(F.elu, _slope(_aten.elu_backward, 1.0, 1.0, 1.0, False)),
    "softplus": Activation(
        F.softplus, lambda x: _aten.softplus_backward(torch.ones_like(x), x, 1, 20)
    ),
    "tanh": Activation(torch.tanh, _slope(_aten.tanh_backward), saves_output=True, center=0.0),
    "sigmoid": Activation(
        torch.sigmoid, _slope(_aten.sigmoid_backward), saves_output=True, center=0.5
    ),
}


def activation(name: str) -> Activation:
    """The function of this name. Raises MethodError for others."""
    if name not in ACTIVATIONS:
        raise MethodError(f"expected function one of {', '.join(ACTIVATIONS)}, found {name!r}")
    return ACTIVATIONS[name]


@dataclass(frozen=True)
class StepFunction:
    """``levels[i]`` between ``boundaries[i - 1]`` and ``boundaries[i]``, of ``|x|`` where it is even."""

    boundaries: tuple[float, ...]
    levels: tuple[float, ...]
    is_even: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """The level of each element."""
        x = x.abs() if self.is_even else x
        number = torch.bucketize(x, x.new_tensor(self.boundaries))
        return x.new_tensor(self.levels)[number]


def representatives(
    function: Activation, levels: tuple[float, ...], dtype: torch.dtype
) -> tuple[float, ...]:
    """For each level what backward must be given in ``dtype`` to multiply by it.

    Of the points where the derivative has the level, that which is nearest to it once rounded to ``dtype``.
    """
    with _disable_current_modes():  # found once, on real tensors, whoever watches the first call
        wanted = torch.tensor(levels, dtype=torch.float64)
        points, number = _crossings(function, wanted)
        kept = function.saved(points).to(dtype)
        off = (function.slope(kept.double()) - wanted[number]).abs()
        off_by_level = torch.where(number == torch.arange(len(levels)).unsqueeze(1), off, math.inf)
        least, nearest = off_by_level.min(1)
        if least.isinf().any():
            raise MethodError(f"expected levels that the derivative takes, found {levels}")
        return tuple(kept[nearest].tolist())


def _crossings(function: Activation, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the derivative has one of the levels, by bisection, and the number of that level."""
    grid = torch.linspace(-FARTHEST, FARTHEST, 16001, dtype=torch.float64)
    slopes = function.derivative(grid)
    above = slopes > levels.unsqueeze(1)
    number, place = (above[:, 1:] != above[:, :-1]).nonzero(as_tuple=True)
    low, high, rises = grid[place], grid[place + 1], above[number, place + 1]
    for _ in range(44):
        middle = (low + high) / 2
        is_right = (function.derivative(middle) > levels[number]) == rises
        low, high = torch.where(is_right, low, middle), torch.where(is_right, middle, high)
    of_level, exact = (slopes == levels.unsqueeze(1)).nonzero(as_tuple=True)
    return torch.cat([(low + high) / 2, grid[exact]]), torch.cat([number, of_level])


@dataclass(frozen=True)
class StepEncoded:
    """The packed numbers of the steps, and the representative of each."""

    packed: Tensor
    values: tuple[float, ...]
    form: Form
    bits: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the numbers."""
        return self.packed.nbytes

    def decode(self) -> Tensor:
        """The representative of each element's step."""
        out = self.form.empty()
        with torch.no_grad():
            flat = in_memory_order(out)
            number = flat.new_empty(min(len(flat), BLOCK), dtype=torch.int32)
            values = flat.new_tensor(self.values)
            for part, packed in _blocks(flat, self.packed, self.bits):
                unpack_block(packed, self.bits, number[: len(part)])
                torch.index_select(values, 0, number[: len(part)], out=part)
        return out


def encode_steps(
    tensor: Tensor,
    boundaries: tuple[float, ...],
    center: float | None,
    values: tuple[float, ...],
    bits: int,
) -> StepEncoded:
    """The steps between ``boundaries`` in which the elements of ``tensor`` lie, or their distances to ``center``."""
    if not tensor.dtype.is_floating_point:
        raise UnsupportedError(f"expected a floating-point tensor, found {tensor.dtype}")
    flat = in_memory_order(tensor)
    packed = flat.new_empty(packed_bytes(len(flat), bits), dtype=torch.uint8)
    with torch.no_grad():
        size = min(len(flat), BLOCK)
        number, above, distance = (flat.new_empty(size) for _ in range(3))
        whole = flat.new_empty(size, dtype=torch.int16)
        for part, into in _blocks(flat, packed, bits):
            count, is_above = number[: len(part)], above[: len(part)]
            if center is not None:
                part = torch.sub(part, center, out=distance[: len(part)]).abs_()
            torch.gt(part, boundaries[0], out=count)
            for boundary in boundaries[1:]:  # a search for each element takes several times as long
                count.add_(torch.gt(part, boundary, out=is_above))
            pack_block(whole[: len(part)].copy_(count), bits, into)
    return StepEncoded(packed, values, Form.of(tensor), bits)


def _blocks(flat: Tensor, packed: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    if not len(flat):
        return []
    parts = flat.split(BLOCK), packed.split(packed_bytes(BLOCK, bits))
    return list(zip(*parts, strict=True))
