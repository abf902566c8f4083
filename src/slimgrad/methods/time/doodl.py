"""Guides a diffusion model by optimising its latent on the loss of the finished image, through an invertible sampler.

Formula: x' = a x + b eps(y, t), y' = a y + b eps(x', t), a = alpha_s / alpha_t, b = sigma_s - a sigma_t (DDIM's step);
    x_s = p x' + (1 - p) y', y_s = p y' + (1 - p) x_s, with x and y in turns first
    latent <- latent + momentum steps along -dL(x_0)/d latent, clipped by entry, renormalised to its first norm
Memory: activations: both samples alone, for any number of steps: backward undoes the steps, last first, with one
    network evaluation's activations at a time. Plain backpropagation keeps those of all 2 T evaluations.
Exactness: exact: the states are made again up to rounding, which the undone averaging makes 1/p^2 times larger a
    step: about 1e3 over 50 steps at p = 0.93, so that float64 is meant.
Limits: a deterministic noise-prediction network, an nn.Module, ``eps(x, t)`` or ``eps(x, t, z)``; twice the
    evaluations of plain sampling; no second derivatives. float32 at 50 steps leaves errors of about 1e-3.
References: Wallace et al. (2023), section 4 and algorithm 1; the sampler is that of Wallace et al. (2022, arXiv
    2211.12446), equations 12 to 15. *departs:* every sample of a batch is guided on its own; no cut-outs of the image
    (put augmentation into the loss).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimgrad.errors import LossError, MethodError
from slimgrad.method import Paper, component
from slimgrad.methods.time.coupled_sampler import LINEAR_BETA, coupled_sample
from slimgrad.methods.time.variance_preserving import VariancePreserving
from slimgrad.types import Column, Exactness


@dataclass(frozen=True)
class Guided:
    """What ``doodl`` found: the latents, the images sampled from them, and the loss before each iteration."""

    latent: Tensor
    image: Tensor
    losses: tuple[float, ...]


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "End-to-End Diffusion Latent Optimization Improves Classifier Guidance",
        "Bram Wallace, Akash Gokul, Stefano Ermon, Nikhil Naik",
        2023,
        "2303.13703",
    ),
)
def doodl(
    model: nn.Module,
    latent: Tensor,
    loss: Callable[[Tensor], Tensor],
    z: Tensor | None = None,
    *,
    iterations: int = 50,
    learning_rate: float = 1.0,
    momentum: float = 0.9,
    clip: float = 1e-3,
    perturbation: float = 1e-4,
    num_steps: int = 50,
    mix: float = 0.93,
    schedule: VariancePreserving = LINEAR_BETA,
) -> Guided:
    """Latents (N, ...) that ``model`` turns into images of low loss, beginning at ``latent``.

    ``loss`` maps the images to a scalar that sums over the batch; it is taken on both coupled samples, halved.
    ``clip`` bounds each entry of a gradient step, ``perturbation`` scales the noise that each iteration adds (on
    torch's default generator). The parameters get no gradient. Raises MethodError for settings out of bounds.
    """
    if iterations < 0 or not 0 <= momentum < 1 or learning_rate <= 0 or clip <= 0:
        raise MethodError(
            "expected iterations >= 0, 0 <= momentum < 1, learning_rate > 0 and clip > 0, got "
            f"{iterations}, {momentum}, {learning_rate} and {clip}"
        )
    norm = _norm(latent)
    latent = latent.detach()
    velocity = torch.zeros_like(latent)
    losses: list[float] = []
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for _ in range(iterations):
            value, slope = _value_and_slope(
                model, latent, loss, z, num_steps=num_steps, mix=mix, schedule=schedule
            )
            losses.append(value)
            velocity = momentum * velocity + (learning_rate * slope).clamp(-clip, clip)
            latent = latent - velocity + perturbation * torch.randn_like(latent)
            latent = latent * (norm / _norm(latent))
        with torch.no_grad():
            image = coupled_sample(
                model, latent, latent, z, num_steps=num_steps, mix=mix, schedule=schedule
            )[0]
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return Guided(latent, image, tuple(losses))


def _value_and_slope(
    model: nn.Module,
    latent: Tensor,
    loss: Callable[[Tensor], Tensor],
    z: Tensor | None,
    *,
    num_steps: int,
    mix: float,
    schedule: VariancePreserving,
) -> tuple[float, Tensor]:
    """The loss of the samples, and its gradient to the latent from which both states begin."""
    with torch.enable_grad():
        leaf = latent.clone().requires_grad_()
        samples = coupled_sample(
            model, leaf, leaf, z, num_steps=num_steps, mix=mix, schedule=schedule
        )
        value = (loss(samples[0]) + loss(samples[1])) / 2
    if value.ndim or not value.requires_grad:
        raise LossError("expected the loss as a scalar that depends on the images")
    (slope,) = torch.autograd.grad(value, leaf)
    return float(value.detach()), slope


def _norm(latent: Tensor) -> Tensor:
    """Each sample's own norm, shaped to multiply the latents."""
    norms = latent.flatten(1).norm(dim=1)
    return norms.view(-1, *[1] * (latent.ndim - 1))
