"""One path of Brownian motion, made again from its seed wherever it is asked for, so that nothing of it is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slimgrad.methods.time.variance_preserving import Level

_DEPTH = 24  # halvings of the path; below them it is a straight line
_WORD = 2**63


@dataclass(frozen=True)
class BrownianPath:
    """W at a noise level, on the clock sigma^2 / alpha^2 and zero at the level ``first``; ``last`` is the other end.

    Halves the stretch between both ends until it meets the level, with a Brownian bridge at each middle, whose draw
    is seeded by its place. Source: Li et al., Scalable gradients for stochastic differential equations, 2020,
    section 4 (the virtual Brownian tree); halves are even in log-SNR.
    """

    seed: int
    first: Level
    last: Level

    def at(self, level: Level, like: Tensor) -> Tensor:
        """W at ``level``, of ``like``'s shape, dtype and device."""
        low, high = self.first.half_log_snr, self.last.half_log_snr
        w_low = torch.zeros_like(like)
        w_high = self._draw(0, like) * math.sqrt(_clock(low) - _clock(high))
        asked, node = level.half_log_snr, 1
        close = 1e-9 * abs(high - low)
        for _ in range(_DEPTH):
            if abs(asked - low) < close:
                return w_low
            if abs(asked - high) < close:
                return w_high
            middle = (low + high) / 2
            share, width = _share(low, middle, high)
            spread = math.sqrt(share * (1 - share) * width)
            w_middle = torch.lerp(w_low, w_high, share) + spread * self._draw(node, like)
            if asked < middle:
                high, w_high, node = middle, w_middle, 2 * node
            else:
                low, w_low, node = middle, w_middle, 2 * node + 1
        return torch.lerp(w_low, w_high, _share(low, asked, high)[0])

    def _draw(self, node: int, like: Tensor) -> Tensor:
        generator = torch.Generator(like.device)
        generator.manual_seed((self.seed * 0x9E3779B97F4A7C15 + node * 0xBF58476D1CE4E5B9) % _WORD)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _clock(half_log_snr: float) -> float:
    return math.exp(-2 * half_log_snr)


def _share(low: float, middle: float, high: float) -> tuple[float, float]:
    """How far ``middle`` is on the clock from ``low`` to ``high``, and the clock's time between both."""
    width = _clock(low) - _clock(high)
    return (_clock(low) - _clock(middle)) / width, width
