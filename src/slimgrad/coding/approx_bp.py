"""ReGELU2 and ReSiLU2: backward is given the derivative of a sum of three ReLUs, a step function with four levels.

Formula: ``h(x) = sum_i a_i ReLU(x - c_i)``, ``sum_i a_i = 1`` and ``sum_i a_i c_i = 0`` (so that the distance to ``f`` over
    the real line is finite), minimises ``integral of (h - f)^2 dx``. Its derivative is 0, ``a_1``, ``a_1 + a_2`` and 1 between
    the ``c_i``. GELU and SiLU are ReLU plus an even function ``e``, and the best ``h`` is ReLU plus ``a (c - |x|)_+``:
    ``c = (-c, 0, c)``, ``a = (a, 1 - 2a, a)``, where ``a`` is the projection of ``e`` and ``c`` makes it largest.
Memory: 2 bits an element.
Exactness: approximate; ``f`` itself is not changed, and ``h`` is near to it where ``h'`` is not near to ``f'``.
Limits: NaN counts as a small number.
References: Yang et al., arXiv 2406.16282, Approx-BP: ReGELU2 and ReSiLU2. *departs:* they search for all coefficients by
    simulated annealing; here the symmetry leaves one unknown, and what is found is at least as near.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.code import Use
from slimgrad.coding.bits import packed_bytes
from slimgrad.coding.step_functions import (
    StepEncoded,
    StepFunction,
    activation,
    encode_steps,
    representatives,
)
from slimgrad.errors import MethodError

BITS = 2


@dataclass(frozen=True)
class ApproxBpCode:
    """Keeps for each element of the input of GELU or SiLU which of the four levels its derivative is taken for."""

    function: str = "gelu"

    def __post_init__(self) -> None:
        if self.function not in ("gelu", "gelu_tanh", "silu"):
            raise MethodError(
                f"expected function 'gelu', 'gelu_tanh' or 'silu', found {self.function!r}"
            )

    @property
    def steps(self) -> StepFunction:
        """What stands in the derivative's place."""
        a, c = relus(self.function)
        return StepFunction((-c, 0.0, c), (0.0, a, 1 - a, 1.0))

    def encode(self, tensor: Tensor) -> StepEncoded:
        """The levels of ``tensor``. Raises UnsupportedError where it is not of a real floating dtype."""
        values = _values(self, tensor.dtype)
        return encode_steps(tensor, self.steps.boundaries, None, values, BITS)

    def num_bytes(self, use: Use) -> int:
        """Bytes of the packed numbers."""
        return packed_bytes(use.num_elements, BITS)


@functools.cache
def relus(function: str) -> tuple[float, float]:
    """``(a, c)`` of the nearest sum of ReLUs."""
    x = np.linspace(0.0, 40.0, 400_001)
    with _disable_current_modes():
        grid = torch.from_numpy(x)
        even = (activation(function).forward(grid) - grid).numpy()

    def projection(c: float) -> float:
        return 3 / c**3 * float(np.trapezoid(even * np.maximum(c - x, 0.0), x))

    def gain(c: float) -> float:
        return projection(c) ** 2 * c**3

    found: Any = minimize_scalar(lambda c: -gain(c), bounds=(0.5, 20.0), options={"xatol": 1e-10})
    c = float(found.x)
    return projection(c), c


@functools.cache
def _values(code: ApproxBpCode, dtype: torch.dtype) -> tuple[float, ...]:
    return representatives(activation(code.function), code.steps.levels, dtype)
