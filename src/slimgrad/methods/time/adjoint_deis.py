"""Samples a diffusion model, and solves the adjoint of its ODE or SDE with an exponential integrator for gradients.

Formula: lambda = log(alpha / sigma), h = lambda_s - lambda_t for s noisier than t, V_t = alpha_t^2 a_t^T d eps/dx;
    order 1: a_s = (alpha_t / alpha_s) a_t + (sigma_s / alpha_s^2) (e^h - 1) V_t
    order 2: V_t replaced by (1 + 1/(2 rho)) V_t - V_r / (2 rho), rho = (lambda_t - lambda_r) / h, r the step before
    d L/d theta, d L/d z: the same with alpha_t a_t^T d eps/d theta, weights sigma_s / alpha_s, and no linear term;
    for the SDE e^h - 1 is doubled everywhere
Memory: activations: the sample alone, for any number of steps; plain backpropagation keeps the network's
    activations of each. Temporaries while backward runs: one network evaluation, and the last two V.
Exactness: approximate: the adjoint ODE is solved with an error of O(h^order), and the states on the way back are
    solved again from the sample, with the same order. The SDE's states are its solver's own, on the same Brownian path.
Limits: a deterministic noise-prediction network, an nn.Module, ``eps(x, t)`` or ``eps(x, t, z)``; running the states
    back is unstable where the sampler contracts strongly; the SDE, which does, needs ``order=1``, float64 and steps
    of less than about 0.3 in log-SNR, and several evaluations for each step back; no second derivatives. No gain at
    few steps: on a digits network, plain Euler steps of the same adjoint in time have smaller errors than order 1 at
    16 to 64 steps, and than order 2 (but for the parameters) up to 64; at 128 order 2 has the smaller ones.
References: Blasingame and Liu (2024): proposition 2.1, equations 2.14 (order 1), 2.15 and algorithm 1 (order 2),
    theorem 3.1 and proposition 3.1 (the SDE's adjoint is an ODE), 3.6 (the SDE's solver). *departs:* states are not
    recorded but solved for backwards; the SDE's noise comes from a seeded Brownian path and is not worked out from
    recorded states (3.7), and its solver's steps are undone by fixed-point iteration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError, MethodError
from slimgrad.method import Paper, component
from slimgrad.methods.time.brownian import BrownianPath
from slimgrad.methods.time.variance_preserving import Level, VariancePreserving
from slimgrad.single_backward import single_backward
from slimgrad.types import Column, Exactness

_LINEAR_BETA = VariancePreserving()
_MOST_ITERATIONS = 50


@component(
    Column.ACTIVATIONS,
    Exactness.APPROXIMATE,
    Paper(
        "AdjointDEIS: Efficient Gradients for Diffusion Models",
        "Zander W. Blasingame, Chen Liu",
        2024,
        "2405.15020",
    ),
)
def adjoint_deis(
    model: nn.Module,
    x_T: Tensor,
    z: Tensor | None = None,
    *,
    num_steps: int = 20,
    num_adjoint_steps: int | None = None,
    order: int = 2,
    path_seed: int | None = None,
    schedule: VariancePreserving = _LINEAR_BETA,
) -> Tensor:
    """The sample x_0 that ``model`` makes of the noise ``x_T``, with gradients to x_T, z and the parameters.

    ``model(x, t)``, or ``model(x, t, z)`` where z is given, predicts the noise in x (N, ...) at times t (N,). Both
    directions take steps that are even in log-SNR, the way back ``num_adjoint_steps`` of them (by default as many).
    ``path_seed`` samples the diffusion SDE on the Brownian path of that seed instead of the ODE. Raises
    MethodError for settings out of bounds.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(
            f"expected the model as an nn.Module, got {type(model).__name__}: the parameters that get a gradient "
            "are the module's"
        )
    if order not in (1, 2) or (order == 2 and path_seed is not None):
        raise MethodError(
            f"expected order 1 or 2, and 1 for the SDE (path_seed), whose states have order 1; got {order}"
        )
    back = num_steps if num_adjoint_steps is None else num_adjoint_steps
    if num_steps < 1 or back < 1:
        raise MethodError(f"expected at least one step each way, got {num_steps} and {back}")
    if path_seed is not None and back != num_steps:
        raise MethodError(
            f"expected as many steps back as forth for the SDE, got {back} and {num_steps}"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = _Run(model, num_steps, back, order, path_seed, schedule)
    return _Sample.apply(run, x_T, z, *parameters)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    num_steps: int
    num_adjoint_steps: int
    order: int
    path_seed: int | None
    schedule: VariancePreserving

    @property
    def factor(self) -> float:
        """What the network's term counts: the SDE's drift has twice the ODE's."""
        return 1.0 if self.path_seed is None else 2.0

    def noise(self, levels: Sequence[Level], x: Tensor) -> Tensor | None:
        """What the path adds between two levels, to be multiplied by the second one's alpha; None for the ODE."""
        if self.path_seed is None:
            return None
        ends = self.schedule.even_in_snr(1)
        path = BrownianPath(self.path_seed, ends[0], ends[1])
        return path.at(levels[1], x) - path.at(levels[0], x)

    def predict(self, x: Tensor, level: Level, z: Tensor | None) -> Tensor:
        """The noise that the network sees in x."""
        times = torch.full((len(x),), level.t, dtype=x.dtype, device=x.device)
        return self.model(x, times) if z is None else self.model(x, times, z)

    def move(self, x: Tensor, start: Level, end: Level, noise_in_x: Tensor) -> Tensor:
        """The state at ``end``, by an exponential step from ``start`` in either direction."""
        step = math.expm1(end.half_log_snr - start.half_log_snr)
        moved = (end.alpha / start.alpha) * x - self.factor * end.sigma * step * noise_in_x
        noise = self.noise((start, end), x)
        return moved if noise is None else moved + end.alpha * noise


class _Multistep:
    """The last values of what is extrapolated along the steps: second order after the first step."""

    def __init__(self, order: int) -> None:
        self._order = order
        self._last: list[Tensor] | None = None
        self._width = 0.0

    def ahead(self, values: list[Tensor], width: float) -> list[Tensor]:
        """The values to use over a step of ``width`` in lambda that begins where ``values`` are known."""
        if self._order == 1:
            return values
        last, share = self._last, width / (2 * self._width) if self._width else 0.0  # 1 / (2 rho)
        self._last, self._width = values, width
        if last is None:
            return values
        return [torch.lerp(v, r, -share) for v, r in zip(values, last, strict=True)]


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, x: Tensor, z: Tensor | None, *parameters: Tensor) -> Any:
        levels = run.schedule.even_in_snr(run.num_steps)
        multistep = _Multistep(run.order)
        with torch.no_grad():
            for start, end in itertools.pairwise(levels):
                width = end.half_log_snr - start.half_log_snr
                (predicted,) = multistep.ahead([run.predict(x, start, z)], width)
                x = run.move(x, start, end, predicted)
        ctx.run = run
        ctx.has_z = z is not None
        ctx.save_for_backward(x, *(() if z is None else (z,)), *parameters)
        return x

    @staticmethod
    @single_backward("adjoint_deis")
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *inputs = ctx.saved_tensors
        a, sums = _solve_adjoint(ctx.run, x, gradients[0], inputs, ctx.has_z)
        found = sums if ctx.has_z else [None, *sums]
        return None, a, *found


def _solve_adjoint(
    run: _Run, x: Tensor, a: Tensor, inputs: list[Tensor], has_z: bool
) -> tuple[Tensor, list[Tensor]]:
    """The gradients at the noisiest level: of the state, and of ``inputs`` (z, where there is one, and parameters)."""
    levels = run.schedule.even_in_snr(run.num_adjoint_steps)[::-1]
    sums = [torch.zeros_like(i) for i in inputs]
    z = inputs[0].detach().requires_grad_() if has_z else None
    asked = inputs if z is None else [z, *inputs[1:]]
    multistep = _Multistep(run.order)
    for start, end in itertools.pairwise(levels):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            predicted = run.predict(x, start, z)
        pulled = torch.autograd.grad(
            predicted, [x, *asked], a, allow_unused=True, materialize_grads=True
        )
        # V of the state carries alpha^2, that of z and the parameters alpha
        values = [predicted.detach(), pulled[0] * start.alpha**2]
        values += [p * start.alpha for p in pulled[1:]]
        width = end.half_log_snr - start.half_log_snr
        predicted, slope, *slopes = multistep.ahead(values, width)
        step = run.factor * end.sigma / end.alpha * math.expm1(width)
        a = (start.alpha / end.alpha) * a + (step / end.alpha) * slope
        for total, part in zip(sums, slopes, strict=True):
            total.add_(part, alpha=step)
        with torch.no_grad():
            z_now = None if z is None else z.detach()
            before = run.move(x, start, end, predicted)
            x = before if run.path_seed is None else _undo_step(run, x, before, start, end, z_now)
    return a, sums


def _undo_step(
    run: _Run, x: Tensor, guess: Tensor, level: Level, noisier: Level, z: Tensor | None
) -> Tensor:
    """The state at ``noisier`` from which the SDE's solver steps to ``x``, by fixed-point iteration.

    The SDE draws paths together so strongly that states solved for backwards would leave theirs.
    """
    share = noisier.alpha / level.alpha
    for _ in range(_MOST_ITERATIONS):
        landed = run.move(guess, noisier, level, run.predict(guess, noisier, z))
        miss = share * (x - landed)
        guess = guess + miss
        if miss.norm() <= 8 * torch.finfo(x.dtype).eps * guess.norm():
            break
    return guess
