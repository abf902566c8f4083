"""A small diffusion model of the digits and a classifier, trained once a session. Shapes: N images, D = 64 pixels."""

import functools
import math

import torch
from tests.digits import digits
from torch import nn

from slimgrad.methods.time.variance_preserving import VariancePreserving

SCHEDULE = VariancePreserving()


class NoiseNet(nn.Module):
    """Predicts the noise in x (N, D) at times t (N,), given z (N, 10) or nothing."""

    def __init__(self, hidden=96, pixels=64):
        super().__init__()
        self.register_buffer("pitch", math.pi * 2.0 ** torch.arange(-1, 3))
        self.time = nn.Linear(8, hidden)
        self.label = nn.Linear(10, hidden, bias=False)
        self.into = nn.Linear(pixels, hidden)
        self.mid = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, pixels)

    def forward(self, x, t, z=None):
        told = t[:, None] * self.pitch
        h = self.into(x) + self.time(torch.cat([told.sin(), told.cos()], -1))
        h = h if z is None else h + self.label(z)
        h = nn.functional.silu(h)
        h = h + nn.functional.silu(self.mid(h))
        return x * t[:, None] + self.out(h)


@functools.cache
@torch.enable_grad()
def noise_net(num_steps=600):
    """A denoiser in float64, trained for a few seconds, its labels left out half of the time."""
    images, labels = digits(torch.float32)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = NoiseNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    slope = SCHEDULE.beta_max - SCHEDULE.beta_min
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / num_steps)
        picked = torch.randint(len(images), (128,), generator=generator)
        t = torch.rand(128, generator=generator) * 0.999 + 0.001
        alpha = torch.exp(-slope * t**2 / 4 - SCHEDULE.beta_min * t / 2)[:, None]
        noise = torch.randn(128, 64, generator=generator)
        x = alpha * images[picked] + (1 - alpha**2).sqrt() * noise
        z = nn.functional.one_hot(labels[picked], 10).float() if step % 2 else None
        optimizer.zero_grad()
        (net(x, t, z) - noise).square().mean().backward()
        optimizer.step()
    return net.double().requires_grad_(True)


@functools.cache
@torch.enable_grad()
def classifier(num_steps=300, seed=0):
    """A frozen classifier of clean digits, in float64."""
    images, labels = digits(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(num_steps):
        picked = torch.randint(len(images), (128,), generator=generator)
        blurred = images[picked] + 0.1 * torch.randn(128, 64, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(blurred), labels[picked]).backward()
        optimizer.step()
    return net.double().requires_grad_(False)


def noise(num, seed=0):
    """Latents (N, 64) from the standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 64, generator=generator, dtype=torch.float64)
