"""ODE blocks: three adjoints next to backpropagation through the solver, and their bytes by the ledger."""

import itertools
import sys

import pytest
import torch
from tests.digits import digits
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError, MethodError, UnsupportedError
from slimgrad.methods.time.adjoint_ode import AdjointODE, gradient_error
from slimgrad.methods.time.chebyshev import barycentric, nodes, quadrature
from slimgrad.types import Column

pytest.importorskip("torchdiffeq")
LOW_MEMORY = ["backsolve", "interpolated", "checkpointed"]


class Field(nn.Module):
    """dy/dt of an ODE on digits: two layers that know the time, strong enough that loose tolerances show."""

    def __init__(self, width=64, hidden=48, gain=3.0):
        super().__init__()
        torch.manual_seed(3)
        self.into = nn.Linear(width + 1, hidden, dtype=torch.float64)
        self.out = nn.Linear(hidden, width, dtype=torch.float64)
        with torch.no_grad():
            self.into.weight *= gain

    def forward(self, t, y):
        told = torch.cat([y, t.to(y).expand(*y.shape[:-1], 1)], -1)
        return self.out(torch.tanh(self.into(told)))


def classifier_loss(labels):
    torch.manual_seed(1)
    head = nn.Linear(64, 10, dtype=torch.float64).requires_grad_(False)
    return lambda y: nn.functional.cross_entropy(head(y), labels)


def on_digits(num=32):
    images, labels = digits()
    return images[:num], classifier_loss(labels[:num])


def saved_bytes(block, x):
    """What is live between forward and backward beyond the weights, and the peak of both passes."""
    x = x.clone().requires_grad_()
    block.zero_grad()
    with Ledger(block, inputs=x) as ledger:
        loss = block(x).square().sum()
        saved = ledger.now_bytes
        loss.backward()
    return saved - ledger.columns[Column.WEIGHTS] - x.nbytes, ledger.peak_bytes


@pytest.mark.parametrize("adjoint", ["backsolve", "interpolated"])
def test_the_gradient_error_falls_with_the_tolerance(adjoint, capsys):
    x, loss = on_digits()
    field = Field()
    errors = []
    for rtol in (1e-2, 1e-4, 1e-6, 1e-8):
        block = AdjointODE(field, adjoint=adjoint, rtol=rtol)
        error = gradient_error(block, x, loss)
        print(error)
        errors.append(error.relative)
        assert set(error.by_name) == {"x", *(n for n, _ in field.named_parameters())}
    assert errors[-1] < 1e-5
    assert errors[0] > 1e-6  # not exact at a loose tolerance, and said so
    assert all(tight < loose for loose, tight in itertools.pairwise(errors))
    assert f"gradient by {adjoint} at rtol=1e-08: relative error" in capsys.readouterr().out


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
@pytest.mark.parametrize("every", [1, 3, None])
def test_checkpointed_is_exact_at_any_tolerance(solver, every):
    x, loss = on_digits(8)
    block = AdjointODE(Field(), adjoint="checkpointed", solver=solver, num_steps=7, every=every)
    plain = AdjointODE(block.field, adjoint="backprop", solver=solver, num_steps=7)
    assert torch.equal(block(x), plain(x))
    assert gradient_error(block, x, loss).relative < 1e-13


@pytest.mark.parametrize("adjoint", LOW_MEMORY)
def test_a_dropped_stage_or_a_scaled_gradient_would_be_seen(adjoint):
    """The error measure itself: a gradient scaled by 0.9 is off by a tenth."""
    x, loss = on_digits(8)
    block = AdjointODE(Field(), adjoint=adjoint, solver="rk4", num_steps=32)
    exact = gradient_error(block, x, loss).relative
    plain_forward = block.field.forward

    def scaled(t, y):
        rate = plain_forward(t, y)
        return rate if block.adjoint == "backprop" else 0.9 * rate + 0.1 * rate.detach()

    copied = AdjointODE(block.field, adjoint="backprop", solver="rk4", num_steps=32)
    true = torch.autograd.grad(loss(copied(x)), list(block.field.parameters()))
    block.field.forward = scaled
    wrong = torch.autograd.grad(loss(block(x)), list(block.field.parameters()))
    off = sum((a - b).norm() for a, b in zip(wrong, true, strict=True))
    assert off / sum(b.norm() for b in true) > 0.05 > 100 * exact


def test_backsolve_and_interpolated_save_the_same_bytes_for_any_number_of_steps():
    x, _ = on_digits()
    field = Field()

    def measured(adjoint, num_steps):
        return saved_bytes(AdjointODE(field, adjoint=adjoint, solver="rk4", num_steps=num_steps), x)

    state = x.nbytes
    for adjoint, most in (("backsolve", 4), ("interpolated", 20)):
        few, many = measured(adjoint, 15), measured(adjoint, 45)
        assert few[0] == many[0] <= most * state
        assert many[1] - few[1] < state / 4  # the grid of times
    few, many = measured("backprop", 15), measured("backprop", 45)
    assert many[0] > 2.5 * few[0]
    assert many[0] > 3 * measured("interpolated", 45)[0]


def test_backsolve_saves_the_same_bytes_for_any_tolerance_of_an_adaptive_solver():
    x, _ = on_digits()
    field = Field()
    blocks = [AdjointODE(field, rtol=rtol) for rtol in (1e-2, 1e-7)]
    loose, tight = (saved_bytes(block, x)[0] for block in blocks)
    assert loose == tight
    plain = [AdjointODE(field, adjoint="backprop", rtol=rtol) for rtol in (1e-2, 1e-7)]
    loose, tight = (saved_bytes(block, x)[0] for block in plain)
    assert tight > 2 * loose  # which takes more steps


def test_checkpointed_keeps_a_state_every_few_steps():
    x, _ = on_digits()
    field = Field()
    for num_steps, every in ((16, 4), (32, 4), (32, 8)):
        block = AdjointODE(
            field, adjoint="checkpointed", solver="rk4", num_steps=num_steps, every=every
        )
        saved, _ = saved_bytes(block, x)
        states = (
            num_steps // every + 1
        )  # those kept, the first of which is the input, and the output
        assert (states - 1) * x.nbytes <= saved <= (states + 1) * x.nbytes + 4096


def test_interpolated_holds_no_parameter_sized_tensor_per_stage():
    field = Field(hidden=1024, gain=1.0)
    x, _ = on_digits(2)
    weights = sum(p.nbytes for p in field.parameters())

    def beyond(adjoint):
        block = AdjointODE(field, adjoint=adjoint, rtol=1e-3)
        return saved_bytes(block, x)[1] - 2 * weights  # they, and their gradients

    assert beyond("backsolve") > 6 * weights
    assert beyond("interpolated") < 2.2 * weights


def test_any_direction_of_time_and_any_shape_of_state():
    torch.manual_seed(0)
    field = Field(width=5, gain=1.0)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    for adjoint in ("backsolve", "interpolated"):
        forth = AdjointODE(field, (0.0, 1.5), adjoint=adjoint, rtol=1e-8)
        back = AdjointODE(field, (1.5, 0.0), adjoint=adjoint, rtol=1e-8)
        torch.testing.assert_close(back(forth(x)), x, rtol=1e-6, atol=1e-6)
        assert gradient_error(back, x).relative < 1e-5


def test_a_linear_ode_has_its_closed_form():
    """dy/dt = r y: y(1) = e^r x, dL/dx = e^r a, dL/dr = e^r x a."""

    class Growth(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, t, y):
            return self.rate * y

    x = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(0.7, dtype=torch.float64).exp()
    for adjoint in ("backsolve", "interpolated"):
        block = AdjointODE(Growth(), adjoint=adjoint, rtol=1e-9)
        y = block(x)
        (3 * y).sum().backward()
        torch.testing.assert_close(y, factor * x, rtol=1e-8, atol=0)
        torch.testing.assert_close(x.grad, 3 * factor.reshape(1), rtol=1e-7, atol=0)
        torch.testing.assert_close(block.field.rate.grad, 3 * factor * 1.5, rtol=1e-7, atol=0)
        x.grad = None


def test_frozen_parameters_and_an_input_without_gradient():
    x, loss = on_digits(4)
    field = Field()
    field.into.requires_grad_(False)
    for adjoint in LOW_MEMORY:
        block = AdjointODE(field, adjoint=adjoint, solver="rk4", num_steps=20)
        loss(block(x)).backward()
        assert field.into.weight.grad is None
        assert field.out.weight.grad.abs().sum() > 0
        field.out.zero_grad()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"adjoint": "reverse"}, "one of backsolve"),
        ({"adjoint": "checkpointed"}, "fixed steps"),
        ({"rtol": 0.0}, "rtol"),
        ({"num_steps": 0}, "num_steps"),
        ({"every": 0}, "every"),
        ({"num_nodes": 1}, "num_nodes"),
        ({"times": (1.0, 1.0)}, "two different times"),
    ],
)
def test_fields_out_of_bounds_are_errors(fields, message):
    with pytest.raises(MethodError, match=message):
        AdjointODE(Field(), **fields)


def test_a_field_that_is_no_module_would_get_no_gradient_and_is_an_error():
    with pytest.raises(ArgumentError, match=r"nn\.Module"):
        AdjointODE(lambda t, y: y)


def test_without_torchdiffeq_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UnsupportedError, match=r"slimgrad\[ode\]"):
        AdjointODE(Field())


@pytest.mark.parametrize("num_nodes", [2, 5, 16])
def test_the_chebyshev_grid_interpolates_and_integrates_polynomials(num_nodes):
    times = torch.tensor([-0.5, 2.0], dtype=torch.float64)
    grid = nodes(num_nodes, times)
    assert grid[0] == times[0]
    assert grid[-1] == times[1]
    degree = num_nodes - 1
    at = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(
        barycentric(grid, at) @ grid**degree, at**degree, rtol=1e-9, atol=1e-9
    )
    assert torch.equal(barycentric(grid, grid[1]), torch.eye(num_nodes, dtype=torch.float64)[1])
    whole = (times[1] ** (degree + 1) - times[0] ** (degree + 1)) / (degree + 1)
    torch.testing.assert_close(quadrature(grid) @ grid**degree, whole)
