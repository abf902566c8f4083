"""What is predicted for a batch while a plan is applied: to the byte what the plan says, and what is then measured."""

import pytest
import torch
from tests.plain_training import State
from tests.sample_models import SAMPLES, adamw

import slimgrad
from slimgrad.batches import map_tensors
from slimgrad.errors import BudgetError, PlanError
from slimgrad.planning.prediction import predicted_peak

LARGER = ["mlp", "attention", "residual_conv", "tied"]


def plans(profile):
    """One plan for half of plain's peak, or near it, without micro-batches; and the leanest."""
    try:
        yield slimgrad.plan(profile, "55%", exactness="bitwise")
    except BudgetError as error:
        yield slimgrad.plan(profile, error.smallest_bytes, exactness="bitwise")
    yield slimgrad.plan(profile, "min")


@pytest.mark.parametrize("name", SAMPLES)
def test_the_planned_batch_is_predicted_to_the_byte(name, profile_of):
    profile = profile_of(name)
    for plan, given in zip(plans(profile), (profile, None), strict=True):
        assert predicted_peak(plan, profile) == plan.peak_bytes
        model, loss_fn, batch = SAMPLES[name].make()
        optimizer = adamw(model)
        before = State.of(model, optimizer)
        step = slimgrad.apply(plan, model, optimizer, loss_fn, profile=given)
        assert step._guard._predicted(batch, plan, None) == plan.peak_bytes
        step.undo()
        assert State.of(model, optimizer).differences(before) == []


@pytest.mark.parametrize("name", ["non_contiguous", "tied"])
def test_gradients_outside_the_device_are_left_alone_while_predicting(name, profile_of):
    plan = slimgrad.plan(profile_of(name), "min", exactness="bitwise", clip_grad_norm=0.05)
    states = []
    for predicts in (False, True):
        model, loss_fn, batch = SAMPLES[name].make()
        optimizer = adamw(model)
        step = slimgrad.apply(plan, model, optimizer, loss_fn)
        for _ in range(3):
            step(batch)
            if predicts:
                assert step._guard._predicted(batch, plan, None) == plan.peak_bytes
        step.undo()
        states.append(State.of(model, optimizer))
    assert states[1].differences(states[0]) == []


@pytest.mark.parametrize("name", LARGER)
def test_a_larger_batch_takes_what_was_predicted(name, profile_of):
    profile = profile_of(name)
    for plan in plans(profile):
        model, loss_fn, batch = SAMPLES[name].make()
        batch = map_tensors(lambda t: torch.cat([t, t, t]), batch)
        step = slimgrad.apply(plan, model, adamw(model), loss_fn, on_larger="run")
        predicted = step._guard._predicted(batch, plan, None)
        for _ in range(2):
            step(batch)
        with step.ledger(batch) as ledger:
            step(batch)
        step.undo()
        assert 0.92 * predicted <= ledger.peak_bytes <= 1.005 * predicted, plan.choices
        assert predicted > plan.peak_bytes


def test_a_profile_of_something_else_is_refused(profile_of):
    plan = slimgrad.plan(profile_of("tied"), "min")
    with pytest.raises(PlanError, match="fingerprint"):
        predicted_peak(plan, profile_of("mlp"))
    bare = slimgrad.plan(profile_of("tied"), "min", exactness="bitwise")
    other = slimgrad.Profile(**{**vars(profile_of("tied")), "variants": {}})
    with pytest.raises(PlanError, match="not measured with"):
        predicted_peak(bare, other)
