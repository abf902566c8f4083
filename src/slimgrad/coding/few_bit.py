"""Few-bit derivatives: backward is given the best step function with ``2^bits`` levels in the derivative's place.

Formula: boundaries ``s`` and levels ``y`` minimise ``sum_i integral over (s_i, s_{i+1}] of (f'(x) - y_i)^2 w(x) dx`` over
    [-A, A], ``y_i`` the mean of ``f'`` over its interval. By dynamic programming over a grid of cells:
    ``D_k(j) = min_i D_{k-1}(i) + C(i, j)``, ``C(i, j)`` the least error of one level over the cells from ``i`` to ``j``.
Memory: ``bits / 8`` bytes an element.
Exactness: approximate; the gradient of an element is ``g y_i`` instead of ``g f'(x)``.
Limits: NaN counts as a small number. Beyond A the outermost levels are used.
References: Novikov et al., arXiv 2202.00441: the minimisation and its dynamic programming; where the derivative is even
    (tanh, sigmoid), the levels are of ``|x|``, so that twice as many steps have numbers. *departs:* the weight outside the
    uniform one is the normal density.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from slimgrad.coding.bits import packed_bytes
from slimgrad.coding.code import Use
from slimgrad.coding.step_functions import (
    StepEncoded,
    StepFunction,
    activation,
    encode_steps,
    representatives,
)
from slimgrad.errors import MethodError

Weight = Literal["uniform", "normal"]


@dataclass(frozen=True)
class FewBitCode:
    """Keeps for each element of an activation function's saved tensor the step that its derivative lies on.

    ``function`` is gelu, gelu_tanh, silu, selu, elu, softplus (saved inputs), tanh or sigmoid (saved outputs); ``bits``
    1 to 4; ``weight`` what the error of the levels is weighted with.
    """

    function: str = "gelu"
    bits: int = 3
    weight: Weight = "uniform"

    def __post_init__(self) -> None:
        activation(self.function)
        if self.bits not in (1, 2, 3, 4):
            raise MethodError(f"expected 1, 2, 3 or 4 bits, found {self.bits}")
        if self.weight not in ("uniform", "normal"):
            raise MethodError(f"expected weight 'uniform' or 'normal', found {self.weight!r}")

    @property
    def steps(self) -> StepFunction:
        """What stands in the derivative's place."""
        return levels(self.function, self.bits, self.weight)

    def encode(self, tensor: Tensor) -> StepEncoded:
        """The steps of ``tensor``. Raises UnsupportedError where it is not of a real floating dtype."""
        boundaries, values = _kept(self, tensor.dtype)
        return encode_steps(tensor, boundaries, activation(self.function).center, values, self.bits)

    def num_bytes(self, use: Use) -> int:
        """Bytes of the packed numbers."""
        return packed_bytes(use.num_elements, self.bits)


@functools.cache
def levels(
    function: str,
    bits: int,
    weight: Weight = "uniform",
    farthest: float = 10.0,
    num_cells: int = 2000,
) -> StepFunction:
    """The best step function with ``2**bits`` levels for the derivative of ``function`` on a grid of ``num_cells``."""
    f = activation(function)
    edges = np.linspace(0.0 if f.is_even else -farthest, farthest, num_cells + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    with _disable_current_modes():
        slopes = f.derivative(torch.from_numpy(middles)).numpy()
    weights = np.ones_like(middles)
    if weight == "normal":
        weights = np.exp(-(middles**2) / 2) / math.sqrt(2 * math.pi)
    cuts = best_cuts(slopes, weights, 2**bits)
    bounds = [0, *cuts, num_cells]
    means = tuple(
        float(np.average(slopes[i:j], weights=weights[i:j] + 1e-300))
        for i, j in itertools.pairwise(bounds)
    )
    return StepFunction(tuple(float(edges[cut]) for cut in cuts), means, f.is_even)


def best_cuts(values: np.ndarray, weights: np.ndarray, num_pieces: int) -> list[int]:
    """Where to cut ``values`` into so many runs, so that their weighted squared distance to the runs' means is least."""
    num_cells = len(values)
    errors = _run_errors(values, weights)
    least, origins = errors[0].copy(), []
    for _ in range(num_pieces - 1):
        through = least[:, None] + errors  # [i, j]: the last run goes from i to j
        origin = through.argmin(0)
        origins.append(origin)
        least = np.take_along_axis(through, origin[None], 0)[0]
    cuts = [num_cells]
    for origin in reversed(origins):
        cuts.append(int(origin[cuts[-1]]))
    return cuts[:0:-1]


def _run_errors(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``[i, j]``: the weighted squared distance of ``values[i:j]`` to their mean, infinite where ``i >= j``."""
    centred = values - np.average(values, weights=weights)
    zero, one, two = (
        np.concatenate([[0.0], np.cumsum(weights * centred**power)]) for power in range(3)
    )
    mass = zero[None] - zero[:, None]
    later = np.arange(len(zero))[None] > np.arange(len(zero))[:, None]
    moment = one[None] - one[:, None]
    errors = two[None] - two[:, None] - moment**2 / np.where(later, np.maximum(mass, 1e-300), 1.0)
    return np.where(later, np.maximum(errors, 0.0), np.inf)


@functools.cache
def _kept(code: FewBitCode, dtype: torch.dtype) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The boundaries among what is saved, and the representative of each level."""
    f, steps = activation(code.function), code.steps
    with _disable_current_modes():
        saved = f.saved(torch.tensor(steps.boundaries, dtype=torch.float64)) - (f.center or 0.0)
        boundaries = tuple(saved.tolist())
    return boundaries, representatives(f, steps.levels, dtype)
