"""From which sparsity on a sparse layer is faster than the dense one: measured here and now."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError
from slimgrad.layers.sparse_conv2d import SparseConv2d
from slimgrad.layers.sparse_linear import SparseLinear


@dataclass(frozen=True)
class BreakEven:
    """``sparsity`` is where both take the same time, None where the sparse layer was slower at every one tried.

    ``ratios`` are seconds of the sparse layer's forward and backward over the dense one's, by sparsity.
    """

    sparsity: float | None
    ratios: dict[float, float]
    num_threads: int

    def __str__(self) -> str:
        at = "none of those tried" if self.sparsity is None else f"{self.sparsity:.3f}"
        tried = ", ".join(f"{s:g}: {r:.2f}" for s, r in self.ratios.items())
        return f"break-even sparsity {at} on {self.num_threads} threads; sparse / dense seconds at {tried}"


def break_even_sparsity(
    layer: nn.Linear | nn.Conv2d,
    x: Tensor,
    *,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98),
    num_runs: int = 7,
) -> BreakEven:
    """Time forward and both gradients of ``layer`` on ``x``, dense and sparse in turns; medians of ``num_runs``.

    Between two sparsities the crossing is interpolated; if the sparse layer is faster already at the lowest one,
    that is told.
    """
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(f"expected an nn.Linear or nn.Conv2d, got {type(layer).__name__}")
    x = x.detach().clone().requires_grad_()
    ratios: dict[float, float] = {}
    for sparsity in sorted(sparsities):
        sparse = (
            SparseLinear.from_dense(layer, sparsity=sparsity)
            if isinstance(layer, nn.Linear)
            else SparseConv2d.from_dense(layer, sparsity=sparsity)
        )
        seconds = _in_turns([_pass(sparse, x), _pass(layer, x)], num_runs)
        ratios[sparsity] = seconds[0] / seconds[1]
    return BreakEven(crossing(ratios), ratios, torch.get_num_threads())


def crossing(ratios: dict[float, float]) -> float | None:
    """The sparsity from which on the ratio stays at or below 1, interpolated; None where the last one is above."""
    points = sorted(ratios.items())
    if not points or points[-1][1] > 1:
        return None
    above = [i for i, (_, ratio) in enumerate(points) if ratio > 1]
    if not above:
        return points[0][0]
    (low, before), (high, after) = points[above[-1]], points[above[-1] + 1]
    return low + (high - low) * (before - 1) / (before - after)


def _pass(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    wanted = [x, *layer.parameters()]
    with torch.no_grad():
        g = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(x), wanted, g)


def _in_turns(runs: Sequence[Callable[[], object]], num_runs: int) -> list[float]:
    """Median seconds of each, after one run that is not counted."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(num_runs + 1):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]
