"""What is said of an optimizer, against what it does."""

import pytest
import torch
from tests.plain_training import State
from tests.sample_models import SAMPLES
from torch import Tensor, nn

from slimgrad import measure
from slimgrad.errors import UnsupportedError
from slimgrad.measuring.optimizer import no_optimizer, optimizer_law
from slimgrad.optimizers import is_elementwise, is_separable

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "foreach": lambda p: torch.optim.AdamW(p, foreach=True),
}


def _model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 7, 3), nn.Flatten(), nn.Linear(28, 33), nn.LayerNorm(33))


def _step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


def _named(model):
    return {id(p): n for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_bytes_are_those_of_the_real_optimizer(name):
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters())
    law = optimizer_law(optimizer, _named(model))
    _step(model, optimizer)
    # single numbers, such as a count of steps, are left out: 4 bytes a parameter
    for said in law.parameters:
        parameter = model.get_parameter(said.name)
        state = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor)]
        assert said.state_bytes == sum(v.nbytes for v in state if v.numel() > 1)
        assert said.nbytes == parameter.nbytes
        assert said.shape == tuple(parameter.shape)
    assert law.state_bytes == sum(said.state_bytes for said in law.parameters)


@pytest.mark.parametrize(
    ("name", "tensors"), [("adamw", 2), ("amsgrad", 3), ("momentum", 1), ("sgd", 0)]
)
def test_state_tensors_of_the_parameter_s_own_shape(name, tensors):
    model = _model()
    law = optimizer_law(OPTIMIZERS[name](model.parameters()), _named(model))
    assert law.state_tensors == tensors
    assert law.state_bytes == tensors * sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_a_law_changes_nothing(name):
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters())
    _step(model, optimizer)
    before = State.of(model, optimizer)
    optimizer_law(optimizer, _named(model))
    assert State.of(model, optimizer).differences(before) == []


def test_groups_have_laws_of_their_own():
    model = _model()
    groups = [
        {"params": list(model[0].parameters()), "momentum": 0.9},
        {"params": list(model[2:].parameters())},
    ]
    law = optimizer_law(torch.optim.SGD(groups, lr=0.1), _named(model))
    by_name = {said.name: said.state_bytes for said in law.parameters}
    assert by_name["0.weight"] == model[0].weight.nbytes
    assert by_name["2.weight"] == 0


class _Normalised(torch.optim.Optimizer):
    """Looks across parameters: divides by the norm of the whole gradient."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        held = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            p.sub_(p.grad / norm, alpha=0.1)


class _RowWise(torch.optim.Optimizer):
    """Looks across the elements of one parameter."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            p.sub_(p.grad / p.grad.norm(), alpha=0.1)


@pytest.mark.parametrize(
    ("optimizer", "separable", "elementwise"),
    [
        (OPTIMIZERS["adamw"], True, True),
        (OPTIMIZERS["momentum"], True, True),
        (OPTIMIZERS["adafactor"], True, False),
        (_RowWise, True, False),
        (_Normalised, False, False),
        (torch.optim.LBFGS, False, False),
    ],
    ids=["adamw", "momentum", "adafactor", "row_wise", "normalised", "lbfgs"],
)
def test_separability_is_shown_by_value(optimizer, separable, elementwise):
    made = optimizer(_model().parameters())
    assert is_separable(made) is separable
    assert is_elementwise(made) is elementwise


def test_lbfgs_is_refused_with_the_reason():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    with pytest.raises(UnsupportedError, match="closure"):
        measure(model, torch.optim.LBFGS(model.parameters()), loss_fn, batch, limit_s=0.0)


def test_transients_are_those_of_the_step():
    """AdamW one by one holds no more at once than one parameter's update; the whole step at most the sum."""
    model = _model()
    law = optimizer_law(OPTIMIZERS["adamw"](model.parameters()), _named(model))
    largest = max(said.nbytes for said in law.parameters)
    assert 0 < max(said.transient_bytes for said in law.parameters) <= 4 * largest
    foreach = optimizer_law(OPTIMIZERS["foreach"](model.parameters()), _named(model))
    assert foreach.step_transient_bytes >= sum(said.nbytes for said in law.parameters)


def test_without_an_optimizer_nothing_is_kept():
    model = _model()
    law = no_optimizer(list(model.named_parameters()))
    assert law.state_bytes == law.step_transient_bytes == 0
    assert [said.nbytes for said in law.parameters] == [p.nbytes for p in model.parameters()]
