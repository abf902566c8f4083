"""A mixed operation: the weighted sum, the gradient of its choice, and what it chooses."""

import pytest
import torch
from torch import nn

from slimgrad.errors import ArgumentError
from slimgrad.layers.mixed_operation import MixedOperation


def mixture(**extra):
    made = {"narrow": nn.Linear(4, 4), "tanh": nn.Tanh(), "zero": None, **extra}
    return MixedOperation(made, nn.Parameter(torch.randn(len(made)))).double()


def test_it_is_the_weighted_sum_with_the_zero_operation_in_the_softmax():
    mixed, x = mixture(), torch.randn(3, 4, dtype=torch.float64)
    exponents = mixed.alpha.exp()
    expected = exponents[0] * mixed.candidates["narrow"](x) + exponents[1] * x.tanh()
    torch.testing.assert_close(mixed(x), expected / exponents.sum())


def test_the_gradient_of_a_choice_is_its_share_times_how_far_it_is_from_the_mixture():
    mixed, x = mixture(), torch.randn(3, 4, dtype=torch.float64)
    wanted = torch.randn(3, 4, dtype=torch.float64)
    out = mixed(x)
    (found,) = torch.autograd.grad((out * wanted).sum(), mixed.alpha)
    outputs = [mixed.candidates["narrow"](x), x.tanh(), torch.zeros_like(x)]
    expected = mixed.alpha.softmax(0) * torch.stack([((o - out) * wanted).sum() for o in outputs])
    torch.testing.assert_close(found, expected)
    assert found.abs().min() > 0


def test_arguments_reach_every_candidate():
    class Shifted(nn.Module):
        def forward(self, x, by, *, times=1):
            return x + by * times

    mixed = MixedOperation({"a": Shifted(), "b": Shifted()})
    x = torch.randn(3)
    torch.testing.assert_close(mixed(x, 2.0, times=3), x + 6)


def test_it_chooses_the_largest_share_but_for_those_left_out():
    mixed = mixture()
    with torch.no_grad():
        mixed.alpha.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert mixed.chosen() == "zero"
    assert mixed.chosen(exclude=("zero",)) == "tanh"
    with pytest.raises(ArgumentError, match="found none"):
        mixed.chosen(exclude=mixed.names)


def test_bad_candidates_are_refused():
    with pytest.raises(ArgumentError, match="2 or more"):
        MixedOperation({"one": nn.Tanh()})
    with pytest.raises(ArgumentError, match="not None"):
        MixedOperation({"zero": None, "nothing": None})
    with pytest.raises(ArgumentError, match=r"shape \(2,\)"):
        MixedOperation({"one": nn.Tanh(), "two": nn.Tanh()}, nn.Parameter(torch.zeros(3)))
