"""Blocks kept as codes, compared one at a time where a plain step does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.every_method.coded_blocks import coded_settings, sensitive_profile, stores
from tests.sample_models import SAMPLES, adamw
from tests.single_method_plans import plan_of
from torch import Tensor

import slimgrad
from slimgrad.coding.cast import CastCode
from slimgrad.method import Refusal
from slimgrad.methods.activations.half_store import HalfStore
from slimgrad.verifying.report import Report

LOSSY = {"projected_store", "velora", "wta_crs"}  # most of a gradient


def compared(name: str = "half_store", error: float = 0.2) -> Report:
    """The report on a model whose blocks are kept in the most accurate setting of a store."""
    settings = coded_settings(sensitive_profile("mlp"), stores()[name])
    assert not isinstance(settings, Refusal)
    model, loss_fn, batch = SAMPLES["mlp"].make()
    optimizer = adamw(model)
    plan = replace(
        plan_of(model, optimizer, settings[0].choices), error=error, plain_peak_bytes=1000
    )
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        return slimgrad.verify(step, batch, time_pairs=0, available_bytes=0)


@pytest.mark.parametrize("name", sorted(stores().keys() - LOSSY))
def test_codes_pass(name: str) -> None:
    report = compared(name)
    assert report.mode == "blocks"
    assert report.passed, report
    assert "kept as codes" in report.notes[-1]


@pytest.mark.parametrize("name", sorted(LOSSY))
def test_codes_that_lose_most_of_a_gradient_do_not(name: str) -> None:
    assert not compared(name).checks["blocks"]


class _Broken:
    """A code that gives something else back."""

    def __init__(self, factor: float) -> None:
        self.factor, self.code = factor, CastCode()

    def num_bytes(self, use: object) -> int:
        return self.code.num_bytes(use)  # pyright: ignore[reportArgumentType]

    def encode(self, tensor: Tensor) -> object:
        return self.code.encode(self.factor * tensor)


@pytest.mark.parametrize("factor", [0.0, -1.0, 3.0])
def test_a_code_that_gives_something_else_back_fails(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(HalfStore, "code", lambda _: _Broken(factor))
    assert not compared().checks["blocks"]


def test_a_code_that_writes_over_what_it_keeps_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overwriting(_Broken):
        def encode(self, tensor: Tensor) -> object:
            kept = self.code.encode(tensor)
            with torch.no_grad():
                tensor.mul_(1 + 1e-4)
            return kept

    monkeypatch.setattr(HalfStore, "code", lambda _: Overwriting(1.0))
    assert not compared().checks["blocks"]
