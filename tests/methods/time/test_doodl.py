"""The coupled sampler and the guidance that runs through it, on digits."""

import itertools

import pytest
import torch
from tests.digits_diffusion import SCHEDULE, classifier, noise, noise_net
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, LossError, MethodError
from slimgrad.methods.time.coupled_sampler import CoupledRun, coupled_sample, invert
from slimgrad.methods.time.doodl import doodl
from slimgrad.types import Column

NUM = 4


def plain_sample(net, x, y, z=None, num_steps=50, mix=0.93):
    """EDICT's equations written out, for autograd, which stores the trajectory."""
    levels = SCHEDULE.even_in_time(num_steps)
    for i, (start, end) in enumerate(itertools.pairwise(levels)):
        a = end.alpha / start.alpha
        b = end.sigma - a * start.sigma
        t = torch.full((len(x),), start.t, dtype=x.dtype)
        states = [x, y] if i % 2 == 0 else [y, x]
        states[0] = a * states[0] + b * net(states[1], t, z)
        states[1] = a * states[1] + b * net(states[0], t, z)
        states[0] = mix * states[0] + (1 - mix) * states[1]
        states[1] = mix * states[1] + (1 - mix) * states[0]
        x, y = states if i % 2 == 0 else states[::-1]
    return x, y


def pixel_loss(samples):
    target = classifier()[0].weight[:NUM]
    return (samples[0] - target).square().sum() + (samples[1] - target).abs().sum() / 3


def gradients(sample, labelled):
    net = noise_net()
    x = noise(NUM).requires_grad_()
    z = torch.eye(10, dtype=torch.float64)[:NUM].requires_grad_() if labelled else None
    asked = [x, *([z] if labelled else []), *net.parameters()]
    samples = sample(net, x, x, z)
    found = torch.autograd.grad(pixel_loss(samples), asked, allow_unused=True)
    return samples, found


@pytest.mark.parametrize("labelled", [True, False])
def test_the_gradients_are_those_of_the_stored_trajectory(labelled):
    true_samples, true = gradients(plain_sample, labelled)
    samples, found = gradients(coupled_sample, labelled)
    assert all(torch.equal(a, b) for a, b in zip(samples, true_samples, strict=True))
    for a, b in zip(found, true, strict=True):
        if b is None:
            assert torch.count_nonzero(a) == 0
        else:
            assert float((a - b).norm() / b.norm()) < 1e-6
    print(f"latent: relative error {float((found[0] - true[0]).norm() / true[0].norm()):.1e}")


def test_a_step_undone_with_another_weight_would_be_seen(monkeypatch):
    _, true = gradients(plain_sample, False)
    unmix = CoupledRun.unmix
    monkeypatch.setattr(
        CoupledRun, "unmix", lambda run, x, y: tuple(s * (1 + 1e-6) for s in unmix(run, x, y))
    )
    _, found = gradients(coupled_sample, False)
    assert float((found[0] - true[0]).norm() / true[0].norm()) > 1e-6


def test_both_latents_have_their_own_gradient_and_the_samples_lead_back_to_them():
    net = noise_net()
    latents = [noise(NUM, seed).requires_grad_() for seed in (1, 2)]
    with torch.no_grad():
        back = invert(net, *coupled_sample(net, *latents))
    for latent, found in zip(latents, back, strict=True):
        torch.testing.assert_close(found, latent.detach(), rtol=1e-7, atol=1e-7)
    true = torch.autograd.grad(pixel_loss(plain_sample(net, *latents)), latents)
    found = torch.autograd.grad(pixel_loss(coupled_sample(net, *latents)), latents)
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def saved_and_peak(sample, num_steps):
    net = noise_net()
    net.zero_grad()
    x = noise(NUM).requires_grad_()
    with Ledger(net, inputs=x) as ledger:
        samples = sample(net, x, x, num_steps=num_steps)
        loss = samples[0].square().sum() + samples[1].square().sum()
        saved = ledger.now_bytes - ledger.columns[Column.WEIGHTS] - x.nbytes
        del samples
        loss.backward()
    net.zero_grad()
    return saved, ledger.peak_bytes


def test_saved_bytes_are_constant_in_the_number_of_steps():
    few, many = (saved_and_peak(coupled_sample, num_steps) for num_steps in (5, 50))
    assert few == many
    assert few[0] <= 4 * NUM * 64 * 8 + 256  # both samples, and what the loss made of them
    plain_few, plain_many = (saved_and_peak(plain_sample, num_steps) for num_steps in (5, 50))
    assert plain_many[0] > 8 * plain_few[0] > 8 * few[0]


def target_loss(target):
    return lambda images: nn.functional.cross_entropy(
        classifier()(images), torch.full((len(images),), target), reduction="sum"
    )


def test_guidance_lowers_the_loss_and_keeps_the_latents_norm():
    start = noise(2, seed=3)
    net = noise_net()
    found = doodl(net, start, target_loss(3), iterations=4, clip=0.2, num_steps=12)
    assert found.losses[-1] < found.losses[0]
    torch.testing.assert_close(found.latent.norm(dim=1), start.norm(dim=1))
    assert not torch.equal(found.latent, start)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    with torch.no_grad():
        image = coupled_sample(net, found.latent, found.latent, num_steps=12)[0]
    assert torch.equal(found.image, image)
    still = doodl(net, start, target_loss(3), iterations=0, num_steps=12)
    assert torch.equal(still.latent, start)
    assert still.losses == ()


def one_step_guided(start, loss, scale, num_steps=50):
    """DDIM whose noise is shifted by the classifier's gradient at the image that one step of denoising foresees."""
    net, x = noise_net(), start
    levels = SCHEDULE.even_in_time(num_steps)
    for s, e in itertools.pairwise(levels):
        leaf = x.detach().requires_grad_()
        eps = net(leaf, torch.full((len(x),), s.t, dtype=x.dtype))
        foreseen = (leaf - s.sigma * eps) / s.alpha
        (slope,) = torch.autograd.grad(loss(foreseen), leaf)
        shifted = eps.detach() + scale * s.sigma * slope
        x = e.alpha / s.alpha * (x - s.sigma * shifted) + e.sigma * shifted
    return x


@pytest.mark.slow
def test_guidance_through_the_sampler_beats_one_step_denoising_guidance():
    """The mean probability that a frozen classifier gives the target, over ten targets and two latents each."""
    targets = torch.arange(20) % 10
    start = noise(20, seed=100)

    def loss(images):
        return nn.functional.cross_entropy(classifier()(images), targets, reduction="sum")

    def reached(images):
        probabilities = classifier()(images).softmax(1)
        return float(probabilities[torch.arange(20), targets].mean())

    with torch.no_grad():
        plain = reached(coupled_sample(noise_net(), start, start)[0])
    scales = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    one_step = {scale: reached(one_step_guided(start, loss, scale)) for scale in scales}
    guided = reached(doodl(noise_net(), start, loss, iterations=15, clip=0.1).image)
    best = max(one_step, key=one_step.__getitem__)
    print(f"plain {plain:.3f}, doodl {guided:.3f}, one-step guidance by scale {one_step}")
    assert best not in (scales[0], scales[-1])  # the other method is given the scale that suits it
    assert guided > one_step[best] > plain


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": -1}, "iterations"),
        ({"momentum": 1.0}, "momentum"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"clip": 0.0}, "clip"),
        ({"mix": 0.0}, "mix"),
        ({"num_steps": 0}, "num_steps"),
    ],
)
def test_settings_out_of_bounds_are_errors(fields, message):
    with pytest.raises(MethodError, match=message):
        doodl(noise_net(), noise(1), target_loss(0), **fields)


def test_other_bad_input_is_an_error():
    with pytest.raises(ArgumentError, match=r"nn\.Module"):
        coupled_sample(lambda x, t: x, noise(1), noise(1))
    with pytest.raises(LossError, match="scalar"):
        doodl(noise_net(), noise(1), lambda images: images, num_steps=2)
    assert all(p.requires_grad for p in noise_net().parameters())
