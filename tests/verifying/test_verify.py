"""verify passes what trains as plain training does, fails what does not, and changes nothing."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from tests.hand_plans import hand_plan, on_model, recomputed
from tests.sample_models import SAMPLES, adamw
from torch import nn

import slimgrad
from slimgrad import catalogue
from slimgrad.errors import VerificationError
from slimgrad.method import Scope, Undo
from slimgrad.methods.activations.recompute import Recompute
from slimgrad.verifying import slimming


def everything(model, optimizer):
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "grads": [p.grad for p in model.parameters()],
            "torch": torch.get_rng_state(),
            "numpy": np.random.get_state()[1].tolist(),
            "python": random.getstate(),
        }
    )


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def applied(model, loss_fn, *choices):
    optimizer = adamw(model)
    return slimgrad.apply(hand_plan(model, optimizer, *choices), model, optimizer, loss_fn)


def verified(model, loss_fn, batch, *choices, available_bytes=None):
    step = applied(model, loss_fn, *(choices or recomputed(model)))
    return slimgrad.verify(step, batch, time_pairs=0, available_bytes=available_bytes)


@pytest.mark.parametrize("available_bytes", [None, 0])
@pytest.mark.parametrize("name", ["mlp", "attention", "conv_batchnorm", "counting_buffer"])
def test_a_good_plan_passes_and_nothing_is_changed(name, available_bytes):
    model, loss_fn, batch = SAMPLES[name].make()
    step = applied(model, loss_fn, *recomputed(model))
    step(batch)
    buffers = [id(b) for b in model.buffers()]
    before = everything(model, step.host.optimizer)
    report = slimgrad.verify(step, batch, available_bytes=available_bytes)
    assert same(everything(model, step.host.optimizer), before)
    assert [id(b) for b in model.buffers()] == buffers
    assert report.passed, str(report)
    assert report.within_budget
    assert report.control_failed
    assert report.mode == ("step" if available_bytes is None else "blocks")
    if available_bytes is None:
        assert report.gradient_error == report.update_error == report.loss_error == 0
        assert report.time_ratio > 0


@pytest.mark.parametrize("method", ["update_in_backward", "offload_gradients", "offload_state"])
def test_the_methods_of_the_update_pass(method):
    model, loss_fn, batch = SAMPLES["tied"].make()
    report = verified(model, loss_fn, batch, *recomputed(model), on_model(method))
    assert report.passed, str(report)
    assert report.update_error == 0


def test_micro_batches_are_judged_by_float64():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    report = verified(model, loss_fn, batch, on_model("micro_batches", num=2))
    assert report.passed, str(report)
    assert 0 < report.float64_gradient_error <= 2 * report.plain_gradient_error + 1e-12
    assert report.gradient_error > 0
    wrong = on_model("micro_batches", num=2, weigh="sum")
    report = verified(*SAMPLES["mlp"].make(), wrong)
    assert not report.checks["gradient"]
    assert not report.passed


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.generator = torch.Generator().manual_seed(1)
        self.calls = 0


class OwnGenerator(_Block):
    def forward(self, x):
        return torch.tanh(self.layer(x)) * torch.rand(8, generator=self.generator)


class Counter(_Block):
    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.layer(x)) * (1 + 0.1 * (self.calls % 7))


class Steady(_Block):
    def forward(self, x):
        return torch.tanh(self.layer(x))


def squares(model, batch):
    return model(batch).square().mean()


def stack(block):
    torch.manual_seed(2)
    return nn.Sequential(*(block() for _ in range(3))), squares, torch.randn(5, 8)


@pytest.mark.parametrize("block", [OwnGenerator, Counter])
def test_a_forward_that_changes_from_run_to_run_fails(block):
    assert verified(*stack(Steady)).passed
    report = verified(*stack(block))
    assert not report.passed
    assert not report.checks["gradient"]
    assert "FAILED" in str(report)


@pytest.mark.parametrize("block", [OwnGenerator, Counter])
def test_a_block_that_changes_from_run_to_run_fails_alone(block):
    assert verified(*stack(Steady), available_bytes=0).checks["blocks"]
    report = verified(*stack(block), available_bytes=0)
    assert not report.checks["blocks"]
    assert "0" in report.notes[0]


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def scaling(factor):
    """An ``attach`` that gives the (last) block's input a gradient ``factor`` times its true one."""

    def attach(method, block):
        path = (getattr(method, "blocks", ()) or (block.path,))[-1]
        module = block.live.model.get_submodule(path)
        forward = module.forward
        module.forward = lambda x: forward(_Scaled.apply(x, factor))
        return Undo(lambda: module.__dict__.pop("forward"))

    return attach


@pytest.mark.parametrize("available_bytes", [None, 0])
@pytest.mark.parametrize("factor", [0.9, 0.0])
def test_a_scaled_or_dropped_gradient_fails(monkeypatch, factor, available_bytes):
    model, loss_fn, batch = stack(Steady)
    monkeypatch.setattr(Recompute, "attach", scaling(1.0))
    report = verified(model, loss_fn, batch, available_bytes=available_bytes)
    assert report.passed, str(report)
    model, loss_fn, batch = stack(Steady)
    monkeypatch.setattr(Recompute, "attach", scaling(factor))
    report = verified(model, loss_fn, batch, available_bytes=available_bytes)
    assert not report.passed
    assert not report.checks["blocks" if available_bytes == 0 else "gradient"]


def test_a_gradient_that_never_comes_fails(monkeypatch):
    def attach(_self, block):
        module = block.live.model.get_submodule(block.path)
        forward = module.forward
        module.forward = lambda x: forward(x.detach())
        return Undo(lambda: module.__dict__.pop("forward"))

    monkeypatch.setattr(Recompute, "attach", attach)
    report = verified(*stack(Steady))
    assert report.gradient_error == float("inf")
    assert not report.passed


def test_slim_raises_where_the_plan_does_not_verify_and_undoes_everything(monkeypatch):
    model, loss_fn, batch = SAMPLES["residual_conv"].make()
    optimizer = adamw(model)
    attach = scaling(0.9)
    for method in catalogue.methods().values():
        if method.scope is not Scope.MODEL:
            monkeypatch.setattr(method, "attach", attach)
    before = everything(model, optimizer)
    with pytest.raises(VerificationError, match="gradient") as caught:
        slimgrad.slim(model, optimizer, loss_fn, batch, budget="min", exactness="bitwise")
    assert not caught.value.report.passed
    assert same(everything(model, optimizer), before)
    assert not any("forward" in vars(m) for m in model.modules())
    loss_fn(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_slim_returns_a_verified_step():
    model, loss_fn, batch = SAMPLES["residual_conv"].make()
    optimizer = adamw(model)
    with slimgrad.slim(model, optimizer, loss_fn, batch, budget="60%") as step:
        assert step.report.passed
        assert step.report.peak_bytes <= step.plan.budget_bytes
        assert step.profile.peak_bytes == step.plan.plain_peak_bytes
        step(batch)


def test_a_report_prints_and_is_json():
    report = verified(*SAMPLES["mlp"].make())
    data = json.loads(json.dumps(report.to_json()))
    assert data["passed"] is True
    assert data["checks"]["gradient"] is True
    text = str(report)
    assert "0 (same bits)" in text
    assert "FAILED" not in text
    report.checks["gradient"] = False
    assert "FAILED" in str(report)
    report.peak_bytes = report.budget_bytes + 1
    assert json.loads(json.dumps(report.to_json()))["within_budget"] is False


def _judged(monkeypatch, change):
    """``slim`` with reports of the verification changed by ``change(report, names of the plan's methods)``."""
    seen = []

    def verify_step(step, sample):
        names = {choice.method for choice in step.plan.choices}
        seen.append(names)
        report = slimgrad.verify(step, sample)
        change(report, names)
        return report

    monkeypatch.setattr(slimming, "verify_step", verify_step)
    return seen


def test_slim_plans_without_an_exact_method_that_rounds_too_much(monkeypatch):
    def change(report, names):
        report.checks["gradient"] = "memory_sharing_norm" not in names

    seen = _judged(monkeypatch, change)
    model, loss_fn, batch = SAMPLES["llama"].make()
    optimizer = adamw(model)
    with slimgrad.slim(model, optimizer, loss_fn, batch, budget="min", allow_compile=False) as step:
        assert "memory_sharing_norm" in seen[0]
        assert "memory_sharing_norm" not in seen[-1]
        assert "gradient's error was" in step.plan.refusals["memory_sharing_norm"]
        assert step.plan.forbid == ("memory_sharing_norm",)
        assert step.report.passed


def test_what_every_plan_gets_wrong_is_told_with_the_plans_methods(monkeypatch):
    seen = _judged(monkeypatch, lambda report, _: report.checks.update(gradient=False))
    model, loss_fn, batch = SAMPLES["llama"].make()
    with pytest.raises(VerificationError, match=r"forbid=\[\.\.\.\] \(here: .*recompute"):
        slimgrad.slim(model, adamw(model), loss_fn, batch, budget="min", allow_compile=False)
    assert len(seen) > 1  # it was tried without each exact method first
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_smallest_budget_is_what_was_measured(monkeypatch):
    def change(report, _):
        report.peak_bytes += 4096

    _judged(monkeypatch, change)
    model, loss_fn, batch = SAMPLES["mlp"].make()
    with slimgrad.slim(model, adamw(model), loss_fn, batch, budget="min") as step:
        assert step.plan.budget_bytes == step.report.peak_bytes > step.plan.peak_bytes
        assert step.report.within_budget
