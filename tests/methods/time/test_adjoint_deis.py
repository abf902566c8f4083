"""Adjoints of diffusion ODEs and SDEs on digits, next to backpropagation through a sampler with fine steps."""

import functools
import itertools
import math

import pytest
import torch
from tests.digits_diffusion import SCHEDULE, classifier, noise, noise_net
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, MethodError
from slimgrad.methods.time import adjoint_deis as module
from slimgrad.methods.time.adjoint_deis import adjoint_deis
from slimgrad.methods.time.brownian import BrownianPath
from slimgrad.types import Column

FINE, NUM = 512, 4


def labels():
    return torch.arange(NUM) * 2 + 1


class Linear(nn.Module):
    """eps(x, t) = c x: quick, and smooth from few steps on."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, x, t, z=None):
        return self.c * x


def plain_sampler(x, z, num_steps, *, seed=None, net=None):
    """The samplers written out, for autograd: second order in log-SNR for the ODE, first order for the SDE."""
    net, previous, before = net or noise_net(), None, None
    levels = SCHEDULE.even_in_snr(num_steps)
    path = None if seed is None else BrownianPath(seed, levels[0], levels[-1])
    for s, t in itertools.pairwise(levels):
        eps = net(x, torch.full((len(x),), s.t, dtype=x.dtype), z)
        h = t.half_log_snr - s.half_log_snr
        if path is not None:
            added = t.alpha * (path.at(t, x) - path.at(s, x))
            x = t.alpha / s.alpha * x - 2 * t.sigma * math.expm1(h) * eps + added
            continue
        used = eps if previous is None else eps + h / before / 2 * (eps - previous)
        x = t.alpha / s.alpha * x - t.sigma * math.expm1(h) * used
        previous, before = eps, h
    return x


def gradients(sample):
    """Of the classifier's loss on the samples: to the latents, to z, and to all parameters in one vector."""
    x = noise(NUM).requires_grad_()
    z = nn.functional.one_hot(labels(), 10).double().requires_grad_()
    loss = nn.functional.cross_entropy(classifier()(sample(x, z)), labels())
    of_x, of_z, *others = torch.autograd.grad(loss, [x, z, *noise_net().parameters()])
    return of_x, of_z, torch.cat([g.flatten() for g in others])


@functools.cache
def reference(seed=None):
    return gradients(lambda x, z: plain_sampler(x, z, FINE, seed=seed))


def errors(found, true):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True)]


def by_deis(num_steps, **settings):
    return gradients(lambda x, z: adjoint_deis(noise_net(), x, z, num_steps=num_steps, **settings))


@pytest.mark.parametrize(
    ("order", "steps", "least_slope"), [(1, (128, 512), 0.9), (2, (32, 64, 128), 1.8)]
)
def test_the_gradient_error_falls_with_the_order(order, steps, least_slope):
    found = [errors(by_deis(n, order=order), reference()) for n in steps]
    for of_what, row in zip(("x_T", "z", "theta"), zip(*found, strict=True), strict=True):
        slope = math.log(row[0] / row[-1]) / math.log(steps[-1] / steps[0])
        print(f"order {order}, {of_what}: errors {row}, slope {slope:.2f}")
        assert slope >= least_slope, of_what
        assert row[-1] < 0.15 / order**2


def test_the_adjoint_of_the_sde_is_an_ode_with_twice_the_coefficient(monkeypatch):
    net = Linear()

    def of(sample):
        x = noise(NUM).requires_grad_()
        return torch.autograd.grad(sample(x).square().sum() / 2, [x, net.c])

    def deis(num_steps, seed=7):
        run = {"num_steps": num_steps, "order": 1, "path_seed": seed}
        return errors(of(lambda x: adjoint_deis(net, x, **run)), true)

    true = of(lambda x: plain_sampler(x, None, FINE, seed=7, net=net))
    coarse, fine = deis(32), deis(128)
    for few, many in zip(coarse, fine, strict=True):
        print(f"SDE: errors {few}, {many}")
        assert math.log(few / many) / math.log(4) > 0.75
    other = deis(128, seed=8)
    print(f"another path: {other}")
    assert max(other) > 2 * max(fine)
    solve, factor = module._solve_adjoint, module._Run.factor

    def halved(run, *args):
        monkeypatch.setattr(module._Run, "factor", property(lambda _: 1.0))
        found = solve(run, *args)
        monkeypatch.setattr(module._Run, "factor", factor)
        return found

    monkeypatch.setattr(module, "_solve_adjoint", halved)
    assert all(wrong > 2 * right for wrong, right in zip(deis(128), fine, strict=True))


@pytest.mark.slow
def test_the_gradient_error_of_the_sde_falls_on_digits():
    found = [errors(by_deis(n, order=1, path_seed=7), reference(seed=7)) for n in (64, 256)]
    for few, many in zip(*found, strict=True):
        print(f"SDE: errors {few}, {many}")
        assert math.log(few / many) / math.log(4) > 0.75


def euler_adjoint(x, a, z, levels):
    """The adjoint ODE of the whole vector field by plain Euler steps in time: what knows nothing of diffusion."""
    net, sums = noise_net(), None
    for t, s in itertools.pairwise(levels):
        x = x.detach().requires_grad_()
        z = z.detach().requires_grad_()
        beta = SCHEDULE.beta_min + (SCHEDULE.beta_max - SCHEDULE.beta_min) * t.t
        rate = -beta / 2 * x + beta / (2 * t.sigma) * net(
            x, torch.full((len(x),), t.t, dtype=x.dtype), z
        )
        of_x, *pulled = torch.autograd.grad(rate, [x, z, *net.parameters()], a)
        width = s.t - t.t
        sums = sums or [torch.zeros_like(p) for p in pulled]
        sums = [total - width * p for total, p in zip(sums, pulled, strict=True)]
        a, x = a - width * of_x, (x + width * rate).detach()
    return a, sums[0], torch.cat([g.flatten() for g in sums[1:]])


def test_it_beats_plain_euler_at_equal_evaluations():
    """The second order does, from about a hundred steps on; with fewer, Euler is closer on this network."""
    num_steps = 128
    z = nn.functional.one_hot(labels(), 10).double()
    with torch.no_grad():
        x = adjoint_deis(noise_net(), noise(NUM), z, num_steps=FINE)
    leaf = x.clone().requires_grad_()
    loss = nn.functional.cross_entropy(classifier()(leaf), labels())
    (a,) = torch.autograd.grad(loss, leaf)
    grids = (SCHEDULE.even_in_snr(num_steps), SCHEDULE.even_in_time(num_steps))
    euler = [errors(euler_adjoint(x, a, z, grid[::-1]), reference()) for grid in grids]
    best = [min(of_one) for of_one in zip(*euler, strict=True)]  # on the grid that suits it
    second = errors(by_deis(FINE, num_adjoint_steps=num_steps, order=2), reference())
    print(f"{num_steps} evaluations: Euler {best}, order 2 {second}")
    assert all(ours < theirs for ours, theirs in zip(second, best, strict=True))


def saved_and_peak(sample, net):
    net.zero_grad()
    x, z = noise(NUM).requires_grad_(), nn.functional.one_hot(labels(), 10).double()
    with Ledger(net, inputs=(x, z)) as ledger:
        out = sample(x, z)
        loss = out.square().sum()
        saved = ledger.now_bytes - ledger.columns[Column.WEIGHTS] - x.nbytes - z.nbytes
        del out
        loss.backward()
    net.zero_grad()
    return saved, ledger.peak_bytes


@pytest.mark.parametrize("settings", [{"order": 1}, {"order": 2}, {"order": 1, "path_seed": 3}])
def test_memory_is_constant_in_the_number_of_steps(settings):
    net = Linear() if "path_seed" in settings else noise_net()
    few, many = (
        saved_and_peak(lambda x, z, n=n: adjoint_deis(net, x, z, num_steps=n, **settings), net)
        for n in (16, 32)
    )
    assert few[0] == many[0] <= 2 * NUM * 64 * 8 + 64  # the sample, and the scalar loss
    assert few[1] == many[1]
    plain_few, plain_many = (
        saved_and_peak(lambda x, z, n=n: plain_sampler(x, z, n, net=net), net) for n in (16, 32)
    )
    assert plain_many[0] > 1.7 * plain_few[0] > 1.7 * many[0]


def test_the_linear_part_is_exact_in_one_step():
    """A network that answers zero leaves x_0 = (alpha_0 / alpha_T) x_T, and that factor as the gradient."""

    class Zero(nn.Module):
        def forward(self, x, t):
            return 0 * x

    x = noise(2).requires_grad_()
    sample = adjoint_deis(Zero(), x, num_steps=1)
    sample.sum().backward()
    first, last = SCHEDULE.even_in_snr(1)
    torch.testing.assert_close(sample, last.alpha / first.alpha * x)
    torch.testing.assert_close(x.grad, torch.full_like(x, last.alpha / first.alpha))


def test_the_brownian_path_is_one_path_at_any_number_of_steps():
    like = torch.zeros(4000, dtype=torch.float64)
    coarse, fine = SCHEDULE.even_in_snr(4), SCHEDULE.even_in_snr(16)
    path = BrownianPath(5, coarse[0], coarse[-1])
    assert torch.equal(path.at(coarse[1], like), path.at(fine[4], like))
    assert torch.count_nonzero(path.at(coarse[0], like)) == 0
    for start, end in itertools.pairwise(fine):
        added = path.at(end, like) - path.at(start, like)
        variance = math.exp(-2 * start.half_log_snr) - math.exp(-2 * end.half_log_snr)
        assert abs(float(added.square().mean()) / variance - 1) < 5 * math.sqrt(2 / 4000)
        assert abs(float(added.mean())) < 5 * math.sqrt(variance / 4000)
    inner = path.at(SCHEDULE.even_in_snr(3)[1], like)  # at no middle of halves
    variance = math.exp(-2 * coarse[0].half_log_snr) - math.exp(
        -2 * SCHEDULE.even_in_snr(3)[1].half_log_snr
    )
    assert abs(float(inner.square().mean()) / variance - 1) < 5 * math.sqrt(2 / 4000)


def test_the_schedule_is_its_own_inverse():
    for level in SCHEDULE.even_in_snr(7):
        assert SCHEDULE.level(level.t).half_log_snr == pytest.approx(level.half_log_snr, abs=1e-9)
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)


def test_bad_settings_are_errors():
    x = noise(1)
    with pytest.raises(MethodError, match="order 1 or 2"):
        adjoint_deis(noise_net(), x, order=3)
    with pytest.raises(MethodError, match="1 for the SDE"):
        adjoint_deis(noise_net(), x, path_seed=0)
    with pytest.raises(MethodError, match="as many steps back"):
        adjoint_deis(noise_net(), x, path_seed=0, order=1, num_adjoint_steps=3)
    with pytest.raises(MethodError, match="at least one step"):
        adjoint_deis(noise_net(), x, num_steps=0)
    with pytest.raises(MethodError, match="cleanest"):
        type(SCHEDULE)(cleanest=2.0)
    with pytest.raises(ArgumentError, match=r"nn\.Module"):
        adjoint_deis(lambda x, t: x, x)
