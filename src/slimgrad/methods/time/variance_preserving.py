"""The variance-preserving diffusion that the samplers here run backwards: x_t = alpha_t x_0 + sigma_t noise.

Source: Song et al., Score-based generative modeling through stochastic differential equations, 2021, appendix B
(beta grows linearly); Lu et al., DPM-Solver, 2022, appendix D.4, for the time at which a log-SNR is reached.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from slimgrad.errors import MethodError


class Level(NamedTuple):
    """One noise level: its time, alpha, sigma, and half its log-SNR, log(alpha / sigma)."""

    t: float
    alpha: float
    sigma: float
    half_log_snr: float


@dataclass(frozen=True)
class VariancePreserving:
    """beta(t) from ``beta_min`` to ``beta_max`` for t in [0, 1]; sampling runs from ``noisiest`` to ``cleanest``."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    noisiest: float = 1.0
    cleanest: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.cleanest < self.noisiest <= 1 or not 0 < self.beta_min < self.beta_max:
            raise MethodError(
                "expected 0 < cleanest < noisiest <= 1 and 0 < beta_min < beta_max, got "
                f"{self.cleanest}, {self.noisiest}, {self.beta_min}, {self.beta_max}"
            )

    def level(self, t: float) -> Level:
        """The noise level at a time."""
        log_alpha = -(self.beta_max - self.beta_min) * t * t / 4 - self.beta_min * t / 2
        sigma = math.sqrt(-math.expm1(2 * log_alpha))
        return Level(t, math.exp(log_alpha), sigma, log_alpha - math.log(sigma))

    def time_of(self, half_log_snr: float) -> float:
        """The time at which log(alpha / sigma) has this value."""
        log_alpha = -0.5 * math.log1p(math.exp(-2 * half_log_snr))
        slope = self.beta_max - self.beta_min
        root = math.sqrt(self.beta_min**2 / 4 - slope * log_alpha)
        return -2 * log_alpha / (root + self.beta_min / 2)

    def even_in_snr(self, num_steps: int) -> list[Level]:
        """``num_steps + 1`` levels, noisiest first, evenly spaced in log-SNR."""
        first, last = (self.level(t).half_log_snr for t in (self.noisiest, self.cleanest))
        found: list[Level] = []
        for i in range(num_steps + 1):
            at = first + (last - first) * i / num_steps
            t = (self.noisiest, self.cleanest)[i > 0] if i in (0, num_steps) else self.time_of(at)
            found.append(self.level(t)._replace(half_log_snr=at))
        return found

    def even_in_time(self, num_steps: int) -> list[Level]:
        """``num_steps + 1`` levels, noisiest first, evenly spaced in time."""
        width = self.noisiest - self.cleanest
        times = [self.noisiest - width * i / num_steps for i in range(num_steps)]
        return [self.level(t) for t in [*times, self.cleanest]]
