"""Codes on blocks with dropout: planned for training, exact in another mode, and verified as they are trained."""

from __future__ import annotations

import functools

import pytest
import torch
from tests.every_method.coded_blocks import coded_settings, stores
from tests.single_method_plans import plan_of
from torch import Tensor, nn

import slimgrad
from slimgrad.measuring.profile import Profile
from slimgrad.method import Refusal
from slimgrad.verifying.gradient import relative_error


class Dropping(nn.Module):
    """Every storage after the first dropout has another number where that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 128), nn.Linear(128, 32)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x_ND: Tensor) -> Tensor:
        h = self.up(self.dropout(self.norm(x_ND)))
        return x_ND + self.dropout(self.down(self.dropout(nn.functional.gelu(h)).tanh()))


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(*(Dropping() for _ in range(3))), torch.randn(256, 32)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@functools.cache
def profile() -> Profile:
    return slimgrad.measure(*made_for_measure(), limit_s=0.0, allow_compile=False, sensitivity=True)


def made_for_measure() -> tuple[nn.Module, None, object, Tensor]:
    model, batch = made()
    return model, None, loss_fn, batch


def gradient(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)
    loss_fn(model, batch).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", sorted(stores()))
def test_codes_are_for_the_mode_that_was_planned_for(name: str) -> None:
    settings = coded_settings(profile(), stores()[name])
    assert not isinstance(settings, Refusal)
    model, batch = made()
    trained = gradient(model, batch)
    evaluated = gradient(model.eval(), batch)
    before_dropout = {n for n in trained if "norm" in n}  # what the norm keeps is made before any
    for coded in settings:
        with slimgrad.apply(plan_of(model, None, coded.choices), model, None, loss_fn):
            assert relative_error(gradient(model.train(), batch), trained) > 0
            found = gradient(model.eval(), batch)
        off = relative_error(
            {n: g for n, g in found.items() if n not in before_dropout},
            {n: g for n, g in evaluated.items() if n not in before_dropout},
        )
        assert off < 1e-6


@pytest.mark.parametrize("name", ["quantized_store", "velora"])
def test_verify_measures_the_error_of_the_step_as_it_is_trained(name: str) -> None:
    settings = coded_settings(profile(), stores()[name])
    assert not isinstance(settings, Refusal)
    model, batch = made()
    plain = gradient(model, batch)
    plan = plan_of(model, None, settings[-1].choices)
    with slimgrad.apply(plan, model, None, loss_fn) as step:
        mine = relative_error(gradient(model, batch), plain)
        torch.manual_seed(1)
        report = slimgrad.verify(step, batch, time_pairs=0)
    assert mine > 1e-3
    assert report.gradient_error == pytest.approx(mine, rel=1e-3)
    assert any("drew the same" in note for note in report.notes)


@pytest.mark.parametrize("error", [0.3, 0.7, 1.5])
def test_the_control_fails_whatever_error_is_allowed(error: float) -> None:
    model, batch = made()
    step = slimgrad.slim(
        model,
        None,
        loss_fn,
        batch,
        budget="60%",
        exactness="approximate",
        error=error,
        allow_compile=False,
        forbid=["micro_batches"],
    )
    assert step.report is not None
    assert step.report.control_failed
    assert step.report.passed
    step.undo()
