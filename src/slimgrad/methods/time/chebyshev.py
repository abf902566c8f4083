"""Interpolation and quadrature on a Chebyshev grid, for trajectories that are kept at few instants.

Shapes: K nodes.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def nodes(num_nodes: int, times: Tensor) -> Tensor:
    """Chebyshev points of the second kind from ``times[0]`` to ``times[-1]``, both included; shape (K,)."""
    angles = torch.arange(num_nodes, dtype=torch.float64) * (math.pi / (num_nodes - 1))
    even = ((1 - angles.cos()) / 2).to(times)
    found = times[0] + even * (times[-1] - times[0])
    found[-1] = times[-1]
    return found


def barycentric(nodes_K: Tensor, t: Tensor) -> Tensor:
    """The weights (K,) with which values at the nodes make the interpolating polynomial's value at ``t``.

    Source: Berrut and Trefethen, Barycentric Lagrange interpolation, 2004, section 5.
    """
    away_K = t.to(nodes_K) - nodes_K
    signs_K = torch.ones_like(nodes_K)
    signs_K[1::2] = -1
    signs_K[0] *= 0.5
    signs_K[-1] *= 0.5
    hit_K = away_K == 0
    if bool(hit_K.any()):
        return hit_K.to(nodes_K)
    weights_K = signs_K / away_K
    return weights_K / weights_K.sum()


def quadrature(nodes_K: Tensor) -> Tensor:
    """Clenshaw and Curtis's weights (K,) for the integral from the first node to the last."""
    weights = torch.tensor(_unit_weights(len(nodes_K)), dtype=torch.float64)
    return weights.to(nodes_K) * (nodes_K[-1] - nodes_K[0])


@functools.cache
def _unit_weights(num_nodes: int) -> tuple[float, ...]:
    """For an interval of length one: the integral of each Chebyshev polynomial, spread over the nodes."""
    last = num_nodes - 1
    integrals = [0.0 if k % 2 else 1 / (1 - k * k) for k in range(num_nodes)]

    def halved(k: int) -> float:
        return 0.5 if k in (0, last) else 1.0

    return tuple(
        2
        / last
        * halved(j)
        * sum(halved(k) * integrals[k] * math.cos(math.pi * j * k / last) for k in range(num_nodes))
        for j in range(num_nodes)
    )
