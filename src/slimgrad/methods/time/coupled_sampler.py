"""EDICT's invertible sampler: two coupled states that step in turns, so that each step can be undone exactly.

Source: Wallace et al., EDICT: Exact diffusion inversion via coupled transformations, 2022, section 4, equations 12
to 15. Here as one ``autograd.Function`` that keeps only the samples and makes the states again on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.errors import ArgumentError, MethodError
from slimgrad.methods.time.variance_preserving import Level, VariancePreserving
from slimgrad.single_backward import single_backward

LINEAR_BETA = VariancePreserving()


def coupled_sample(
    model: nn.Module,
    x_T: Tensor,
    y_T: Tensor,
    z: Tensor | None = None,
    *,
    num_steps: int = 50,
    mix: float = 0.93,
    schedule: VariancePreserving = LINEAR_BETA,
) -> tuple[Tensor, Tensor]:
    """The two samples that ``model`` makes of the latents x_T and y_T, differentiable in them, z and the parameters.

    ``model(x, t)``, or ``model(x, t, z)`` where z is given, predicts the noise in x (N, ...) at times t (N,).
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ArgumentError(
            f"expected the model as an nn.Module, got {type(model).__name__}: the parameters that get a gradient "
            "are the module's"
        )
    if num_steps < 1 or not 0 < mix <= 1:
        raise MethodError(f"expected num_steps >= 1 and 0 < mix <= 1, got {num_steps} and {mix}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = CoupledRun(model, num_steps, mix, schedule)
    return _CoupledSample.apply(run, x_T, y_T, z, *parameters)  # pyright: ignore[reportReturnType]


def invert(
    model: nn.Module,
    x_0: Tensor,
    y_0: Tensor,
    z: Tensor | None = None,
    *,
    num_steps: int = 50,
    mix: float = 0.93,
    schedule: VariancePreserving = LINEAR_BETA,
) -> tuple[Tensor, Tensor]:
    """The latents of which ``coupled_sample`` makes these samples."""
    run = CoupledRun(model, num_steps, mix, schedule)
    with torch.no_grad():
        for i in reversed(range(num_steps)):
            x_0, y_0 = run.undo(i, x_0, y_0, z)
    return x_0, y_0


@dataclass(frozen=True)
class CoupledRun:
    """One sampler: the network, the number of steps, and the mixing weight."""

    model: nn.Module
    num_steps: int
    mix: float
    schedule: VariancePreserving

    def step(self, i: int, x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """The i-th step to less noise. Odd steps begin with the other state, so that neither leads."""
        if i % 2:
            y, x = self._step(i, y, x, z)
            return x, y
        return self._step(i, x, y, z)

    def undo(self, i: int, x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states before the i-th step."""
        if i % 2:
            y, x = self._undo(i, y, x, z)
            return x, y
        return self._undo(i, x, y, z)

    def coefficients(self, i: int) -> tuple[Level, float, float]:
        """The level that the i-th step starts from; what it takes of the state and of the noise (DDIM's)."""
        start, end = self.schedule.even_in_time(self.num_steps)[i : i + 2]
        scale = end.alpha / start.alpha
        return start, scale, end.sigma - scale * start.sigma

    def predict(self, x: Tensor, level: Level, z: Tensor | None) -> Tensor:
        """The noise that the network sees in x."""
        times = torch.full((len(x),), level.t, dtype=x.dtype, device=x.device)
        return self.model(x, times) if z is None else self.model(x, times, z)

    def _step(self, i: int, x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        level, scale, weight = self.coefficients(i)
        x = scale * x + weight * self.predict(y, level, z)
        y = scale * y + weight * self.predict(x, level, z)
        x = self.mix * x + (1 - self.mix) * y
        return x, self.mix * y + (1 - self.mix) * x

    def _undo(self, i: int, x: Tensor, y: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        level, scale, weight = self.coefficients(i)
        x, y = self.unmix(x, y)
        y = (y - weight * self.predict(x, level, z)) / scale
        return (x - weight * self.predict(y, level, z)) / scale, y

    def unmix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The states before they were averaged."""
        y = (y - (1 - self.mix) * x) / self.mix
        return (x - (1 - self.mix) * y) / self.mix, y


class _CoupledSample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: CoupledRun, x: Tensor, y: Tensor, z: Tensor | None, *parameters: Tensor
    ) -> Any:
        with torch.no_grad():
            for i in range(run.num_steps):
                x, y = run.step(i, x, y, z)
        ctx.run = run
        ctx.has_z = z is not None
        ctx.save_for_backward(x, y, *(() if z is None else (z,)), *parameters)
        return x, y

    @staticmethod
    @single_backward("coupled_sample")
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y, *inputs = ctx.saved_tensors
        sums = [torch.zeros_like(i) for i in inputs]
        states, slopes = [x, y], list(gradients)
        for i in reversed(range(ctx.run.num_steps)):
            lead = i % 2  # the state that this step changes first
            _step_back(ctx.run, i, states, slopes, lead, inputs, sums, ctx.has_z)
        return None, *slopes, *(sums if ctx.has_z else [None, *sums])


def _step_back(
    run: CoupledRun,
    i: int,
    states: list[Tensor],
    slopes: list[Tensor],
    lead: int,
    inputs: list[Tensor],
    sums: list[Tensor],
    has_z: bool,
) -> None:
    """Undo the i-th step on ``states``, and take ``slopes`` and ``sums`` through it: two network evaluations."""
    level, scale, weight = run.coefficients(i)
    other = 1 - lead
    p = run.mix
    states[lead], states[other] = run.unmix(states[lead], states[other])
    slope = slopes[lead] + (1 - p) * slopes[other]
    slopes[lead], slopes[other] = p * slope, p * slopes[other] + (1 - p) * slope
    for changed, told in ((other, lead), (lead, other)):
        predicted, pulled = _pull_back(
            run, level, states[told], weight * slopes[changed], inputs, has_z
        )
        states[changed] = (states[changed] - weight * predicted) / scale
        slopes[told] = slopes[told] + pulled[0]
        slopes[changed] = scale * slopes[changed]
        for total, part in zip(sums, pulled[1:], strict=True):
            total += part


def _pull_back(
    run: CoupledRun, level: Level, state: Tensor, slope: Tensor, inputs: list[Tensor], has_z: bool
) -> tuple[Tensor, list[Tensor]]:
    """The network's prediction at ``state``, and its transposed Jacobians times ``slope``: state, then inputs."""
    with torch.enable_grad():
        state = state.detach().requires_grad_()
        z = inputs[0].detach().requires_grad_() if has_z else None
        predicted = run.predict(state, level, z)
    asked = [state, *inputs] if z is None else [state, z, *inputs[1:]]
    pulled = torch.autograd.grad(predicted, asked, slope, allow_unused=True, materialize_grads=True)
    return predicted.detach(), list(pulled)
