"""What codes do to the gradient: measured without a trace, smaller with more bits, kept to by ``slim``."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.every_method.coded_blocks import (
    coded_profile,
    coded_settings,
    gradient_of,
    sensitive_profile,
    stores,
)
from tests.methods.activations.coded_mlp import mean_square
from tests.plain_training import State, plain_step
from tests.sample_models import SAMPLES, adamw
from torch import Tensor, nn

import slimgrad
from slimgrad.errors import LossError, MethodError, PlanError
from slimgrad.host import Host
from slimgrad.measuring.profile import Profile
from slimgrad.method import Block, CodingCost, Refusal, Scope, Setting
from slimgrad.methods.activations.approx_bp import ApproxBp
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.few_bit import FewBit
from slimgrad.methods.activations.half_store import HalfStore
from slimgrad.methods.activations.quantized_store import QuantizedStore
from slimgrad.planning import sensitivity
from slimgrad.planning.sensitivity import coding_costs, gradient_noise, largest_errors
from slimgrad.planning.settings import block_record, layout_of, model_record


@pytest.mark.parametrize("sample", ["attention", "conv_batchnorm"])
def test_nothing_of_the_users_is_changed(sample: str) -> None:
    profile = sensitive_profile(sample)
    model, loss_fn, batch = SAMPLES[sample].make()
    optimizer = adamw(model)
    plain_step(model, optimizer, loss_fn, batch)  # there is state that could be changed
    loss_fn(model, batch).backward()  # and there are gradients
    before = State.of(model, optimizer)
    held = {path: set(vars(module)) for path, module in model.named_modules()}
    assert coding_costs(Host(model, optimizer, loss_fn), batch, profile)
    assert State.of(model, optimizer).differences(before) == []
    assert {path: set(vars(module)) for path, module in model.named_modules()} == held


@pytest.mark.parametrize("sample", ["mlp", "attention"])
def test_errors_fall_with_bits_and_every_cost_is_positive(sample: str) -> None:
    coding = sensitive_profile(sample).coding
    by_name: dict[str, list[tuple[int, float]]] = {}
    for (name, fields), error in largest_errors(coding):
        by_name.setdefault(name, []).append((dict(fields).get("bits", 16), error))
    assert {"half_store", "quantized_store"} <= by_name.keys() <= stores().keys()
    for name in by_name.keys() & {"quantized_store", "stochastic_store"}:
        found = by_name[name]
        errors = [error for _, error in sorted(found)]
        # a bit more halves the step: at least a factor of 2 for each two bits
        assert all(more > 2 * less > 0 for more, less in itertools.pairwise(errors))
    for costs in coding.values():
        assert all(min(c.encode_s, c.decode_s, c.squared_error) > 0 for c in costs.values())


def test_largest_errors_are_sums_of_squares_in_order() -> None:
    narrow, wide = ("b", (("bits", 2),)), ("a", ())
    costs = {
        "0": {narrow: CodingCost(1.0, 1.0, 9e-4), wide: CodingCost(1.0, 1.0, 1e-4)},
        "1": {narrow: CodingCost(1.0, 1.0, 16e-4)},
    }
    assert largest_errors(costs) == [(wide, pytest.approx(0.01)), (narrow, pytest.approx(0.05))]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.down(nn.functional.gelu(self.up(x_ND)))


def test_one_setting_tells_how_blocks_differ_and_others_how_much_worse_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks err by the square of their place and one; codes of four bits 3 + place / 8 times as much."""
    tried: dict[str, list[str]] = {}

    def numbered(_: Any, trial: Any) -> sensitivity.Effect:
        setting, place = trial.store.setting, float(trial.path)
        tried.setdefault(str(setting), []).append(trial.path)
        worse = 3 + place / 8 if dict(setting[1]).get("bits") == 4 else 1.0
        square = worse * (1 + place) ** 2
        return sensitivity.Effect(square, square / 100, 1 - square / 1000)

    monkeypatch.setattr(sensitivity._Passes, "effect", numbered)
    model, batch = nn.Sequential(*(Mlp() for _ in range(9))), torch.randn(128, 16)
    profile = slimgrad.measure(model, None, mean_square, batch, limit_s=0.0, allow_compile=False)
    costs = coding_costs(Host(model, None, mean_square), batch, profile)
    counted = sorted(len(set(paths)) for paths in tried.values())
    assert counted == [3] * (len(counted) - 1) + [9]
    assert sorted(map(int, costs)) == list(range(9))
    for path, by_setting in costs.items():
        for setting, cost in by_setting.items():
            worse = 3 + float(path) / 8 if dict(setting[1]).get("bits") == 4 else 1.0
            square = worse * (1 + float(path)) ** 2
            assert cost.squared_error == pytest.approx(square)
            assert cost.own_error == pytest.approx(square / 100)
            assert cost.own_cosine == pytest.approx(1 - square / 1000)


@pytest.mark.parametrize(("store", "bits"), [(HalfStore, 16), (QuantizedStore, 4)])
def test_the_share_of_each_tensor_is_that_of_its_own_method(
    store: type[CodedStore], bits: int
) -> None:
    """One tensor of a block is large beside what varies in it, as log-sum-exps are: few bits of a range keep it better
    than bfloat16's eight of each value."""
    model, loss_fn, batch = SAMPLES["attention"].make()
    host, profile = Host(model, None, loss_fn), sensitive_profile("attention")
    layout, record = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    passes = sensitivity._Passes(host, batch)
    path, costs = list(profile.coding.items())[len(profile.coding) // 2]
    measured = block_record(profile, layout, layout.blocks[path], model=record)
    asked = Block(path, Scope.BLOCK, measured)
    chosen = next(s for s in store.grades(asked) if getattr(s, "bits", 16) == bits)
    assert measured.graph is not None
    assert len(chosen.storages) > 2
    cost = costs[chosen.setting]
    for number, share in cost.shares:
        alone = passes.effect(sensitivity._Trial(path, chosen.only(number), measured.graph))
        assert share * cost.squared_error == pytest.approx(alone.squared_error, rel=0.75)


@pytest.mark.parametrize("store", [ApproxBp, FewBit, HalfStore])
def test_blocks_together_do_no_more_than_they_are_said_to(store: type[CodedStore]) -> None:
    """Of equal blocks in a row the errors are alike, and more together than their squares add up to."""
    torch.manual_seed(0)
    block = Mlp()
    model, batch = nn.Sequential(*(copy.deepcopy(block) for _ in range(6))), torch.randn(256, 16)
    profile = coded_profile(model, mean_square, batch)
    exact = gradient_of(model, mean_square, batch)
    settings = coded_settings(profile, store)
    assert not isinstance(settings, Refusal)
    for coded in settings:
        setting = next(iter(coded.by_path.values()))[0].setting
        told = sum(costs[setting].squared_error for costs in profile.coding.values()) ** 0.5
        undo = coded.attach(Host(model, None, mean_square))
        found = gradient_of(model, mean_square, batch)
        undo()
        assert 0 < (found - exact).norm() / exact.norm() <= told * (1 + 1e-4), setting


def test_errors_that_leave_no_gradient_are_not_tried_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks err by squares of 0.1, 0.2 and so on of the gradient's: four of them are no more than it."""
    together: list[int] = []

    def by_place(_: Any, trial: Any) -> sensitivity.Effect:
        return sensitivity.Effect(0.1 + 0.1 * float(trial.path), 0.1, 0.9)

    def twice(_: Any, trials: Sequence[Any]) -> float:
        together.append(len(trials))
        return 2 * sum(0.1 + 0.1 * float(t.path) for t in trials)

    monkeypatch.setattr(sensitivity._Passes, "effect", by_place)
    monkeypatch.setattr(sensitivity._Passes, "squared_error", twice)
    model, batch = nn.Sequential(*(Mlp() for _ in range(6))), torch.randn(128, 16)
    profile = slimgrad.measure(model, None, mean_square, batch, limit_s=0.0, allow_compile=False)
    costs = coding_costs(Host(model, None, mean_square), batch, profile)
    assert set(together) == {4}  # 0.1 + 0.2 + 0.3 + 0.4
    for path, by_setting in costs.items():
        for cost in by_setting.values():
            assert cost.squared_error == pytest.approx(2 * (0.1 + 0.1 * float(path)))
            assert cost.own_error == 0.1


def test_a_gradient_of_zero_is_not_divided_by() -> None:
    model, batch = nn.Sequential(*(Mlp() for _ in range(3))), torch.randn(256, 16)
    profile = coded_profile(model, lambda model, batch: 0.0 * mean_square(model, batch), batch)
    assert {c.squared_error for costs in profile.coding.values() for c in costs.values()} == {0.0}


def test_the_noise_of_batches_is_that_of_their_samples() -> None:
    """Gradients of single samples are the samples: the noise of their mean is known."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 1, bias=False)
    batch = 1.0 + torch.randn(64, 1000)
    for loss_fn in (lambda m, x: m(x).mean(), lambda m, x: m(x).sum()):
        found = gradient_noise(Host(model, None, loss_fn), batch, [])
        assert found[""] == pytest.approx(1 / 8, rel=0.1)  # of the mean of 64: 1 / sqrt(64) of 1
    assert model.weight.grad is None
    assert gradient_noise(Host(model, None, loss_fn), batch[:1], []) == {}


def test_the_own_gradient_of_a_block_is_told_apart() -> None:
    for path, costs in sensitive_profile("attention").coding.items():
        for setting, cost in costs.items():
            assert 0 < cost.own_error < 1.5, (path, setting)
            # |a - b|^2 / |b|^2 = 1 + r^2 - 2 r c for lengths' ratio r: no less than 1 - c^2
            assert cost.own_error**2 >= 1 - cost.own_cosine**2 - 1e-9


def test_fake_weights_and_steps_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile = sensitive_profile("mlp")
    model, loss_fn, batch = SAMPLES["mlp"].make()
    host = Host(model, None, loss_fn)
    monkeypatch.setattr(sensitivity, "free_bytes", lambda _: 2 * profile.peak_bytes - 1)
    with pytest.raises(LossError, match="smaller batch"):
        coding_costs(host, batch, profile)
    monkeypatch.setattr(sensitivity, "is_fake", lambda _: True)
    with pytest.raises(LossError, match="real tensors"):
        coding_costs(host, batch, profile)


@pytest.mark.parametrize("wrong", [{"error": 0}, {"error": True}, {"forbid": ["mesaa"]}])
def test_what_cannot_be_asked_for_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    from slimgrad.verifying import slimming

    def measured(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured")

    monkeypatch.setattr(slimming, "measure", measured)
    model, loss_fn, batch = SAMPLES["mlp"].make()
    with pytest.raises((PlanError, MethodError)):
        slimgrad.slim(model, None, loss_fn, batch, budget="50%", exactness="approximate", **wrong)


@functools.cache
def coded_alone(shortened: float = 1.0) -> Profile:
    """A profile of a small transformer in which codes alone are cheap, and the cheaper the fewer bits they have.

    Their errors are said to be ``shortened`` times what they are.
    """
    model, loss_fn, batch = SAMPLES["attention"].make()
    profile = coded_profile(model, loss_fn, batch)  # no state that could go
    plain = profile.variants[()]
    timed = replace(plain, op_seconds=np.full_like(plain.op_seconds, 1e-3))

    def shown(setting: Setting, cost: CodingCost) -> CodingCost:
        seconds = 1e-11 * dict(setting[1]).get("bits", 16)
        return CodingCost(seconds, seconds, cost.squared_error * shortened**2)

    coding = {p: {s: shown(s, c) for s, c in costs.items()} for p, costs in profile.coding.items()}
    return replace(profile, variants={(): timed}, coding=coding)


def slimmed(
    monkeypatch: pytest.MonkeyPatch, shortened: float, error: float
) -> tuple[slimgrad.Step, Sequence[Any]]:
    """The step that ``slim`` makes of the small transformer, and each plan's predicted error."""
    from slimgrad.verifying import slimming

    profile, planned = coded_alone(shortened), list[Any]()

    def noted(*arguments: Any, **kwargs: Any) -> Any:
        planned.append(slimgrad.plan(*arguments, **kwargs))
        return planned[-1]

    monkeypatch.setattr(slimming, "measure", lambda *_, **__: profile)
    monkeypatch.setattr(slimming, "plan", noted)
    model, loss_fn, batch = SAMPLES["attention"].make()
    kwargs = {"budget": "92%", "exactness": "approximate", "error": error}
    return slimgrad.slim(model, None, loss_fn, batch, **kwargs), planned


def test_slim_keeps_to_the_error_with_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _ = slimmed(monkeypatch, 1.0, 0.02)
    assert step.report.passed
    assert 0 < step.report.gradient_error <= 0.02
    assert {c.method for c in step.plan.choices} & stores().keys()
    assert step.report.peak_bytes <= step.plan.budget_bytes


def test_a_plan_whose_error_is_measured_above_what_is_allowed_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, planned = slimmed(monkeypatch, 0.1, 0.006)
    assert len(planned) >= 2
    assert planned[-1].predicted_error < planned[0].predicted_error
    assert step.plan.error == 0.006  # what the user allowed, not what was planned for
    assert step.report.passed
    assert 0 < step.report.gradient_error <= 0.006
    assert {c.method for c in step.plan.choices} & stores().keys()
