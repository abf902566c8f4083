"""Steps that were not verified measure their first three runs, and tighten the plan between them where they must."""

import copy
import warnings

import pytest
import torch
from tests.plain_training import State, plain_step
from tests.sample_models import SAMPLES, adamw
from torch import nn

import slimgrad
from slimgrad import catalogue
from slimgrad.errors import BudgetError, PlanError, PlanTightened
from slimgrad.measuring.fake import is_fake

WIDTH, SAMPLES_A_BATCH = 32, 64


def stack(num=6):
    torch.manual_seed(1)
    blocks = (
        nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(num)
    )
    model = nn.Sequential(*blocks, nn.Dropout(0.1))
    return model, adamw(model), torch.randn(SAMPLES_A_BATCH, WIDTH)


def hiding(num_bytes):
    """A loss that holds ``num_bytes`` through the whole step, but not while it is only traced."""
    held = []

    def loss_fn(model, batch):
        if not is_fake(next(model.parameters())):
            held[:] = [torch.zeros(num_bytes // 4)]
        return model(batch).square().mean()

    return loss_fn


def squares(model, batch):
    return model(batch).square().mean()


def budget_of(profile):
    """Bytes that leave room for a plan with 60 KiB less."""
    least = slimgrad.plan(profile, "min", exactness="bitwise").peak_bytes
    return least + 70_000


@pytest.fixture(scope="module")
def profile():
    model, optimizer, batch = stack()
    return slimgrad.measure(model, optimizer, squares, batch, limit_s=0.0)


def applied(profile, loss_fn, budget):
    """What ``slim(..., verify=False)`` does once it has measured."""
    model, optimizer, batch = stack()
    made = slimgrad.plan(profile, budget, exactness="bitwise")
    return slimgrad.apply(made, model, optimizer, loss_fn, profile=profile), batch


def measured_peak(step, batch):
    with step.ledger(batch) as ledger:
        step(batch)
    return ledger.peak_bytes


def test_a_right_prediction_is_measured_and_nothing_is_changed(profile):
    step, batch = applied(profile, squares, budget_of(profile))
    plan = step.plan
    for _ in range(5):
        step(batch)
    assert [m.step for m in step.history] == [1, 2, 3]
    assert all(m.over_bytes == 0 for m in step.history)
    assert step.history[2].peak_bytes == pytest.approx(plan.peak_bytes, rel=0.03)
    assert step.plan is plan
    assert not step.tightenings


def test_a_ledger_of_the_users_counts_the_same(profile):
    step, batch = applied(profile, squares, budget_of(profile))
    for _ in range(3):
        with step.ledger(batch) as ledger:
            step(batch)
        assert ledger.peak_bytes == step.history[-1].peak_bytes


def test_nothing_is_measured_after_the_first_steps(profile, monkeypatch):
    step, batch = applied(profile, squares, budget_of(profile))
    for _ in range(3):
        step(batch)
    monkeypatch.setattr(step, "ledger", None)
    step(batch)
    step.undo()
    model, optimizer, batch = stack()
    step = slimgrad.apply(slimgrad.plan(profile, "100%"), model, optimizer, squares)
    step(batch)
    assert not step.history  # apply was not told what the plan was made from


@pytest.mark.parametrize("given", ["slim", "apply"])
def test_a_step_above_the_budget_is_tightened_told_and_fits(profile, given):
    budget, loss_fn = budget_of(profile), hiding(40_000)
    if given == "slim":
        model, optimizer, batch = stack()
        step = slimgrad.slim(
            model, optimizer, loss_fn, batch, budget=budget, exactness="bitwise", verify=False
        )
    else:
        step, batch = applied(profile, loss_fn, budget)
    before = step.plan
    with pytest.warns(PlanTightened, match="made again") as told:
        step(batch)
    assert told[0].filename == __file__
    assert step.num_steps == 1
    (told,) = step.tightenings
    assert told.measured.peak_bytes > budget >= before.peak_bytes
    assert told.before is before
    assert told.after is step.plan
    assert step.plan.tightened_bytes == told.reserve_bytes >= 35_000
    assert step.plan.peak_bytes <= budget - told.reserve_bytes
    assert step.plan.budget_bytes == before.budget_bytes
    for _ in range(4):
        step(batch)
    assert [m.step for m in step.history] == [1, 2, 3, 4]
    assert all(m.peak_bytes <= budget for m in step.history[1:])
    assert measured_peak(step, batch) <= budget


def test_tightening_loses_no_state_and_trains_to_the_same_bits(profile):
    model, optimizer, batch = stack()
    torch.manual_seed(3)
    losses = [plain_step(model, optimizer, squares, batch) for _ in range(5)]
    expected = State.of(model, optimizer)
    step, batch = applied(profile, hiding(40_000), budget_of(profile))
    torch.manual_seed(3)
    with pytest.warns(PlanTightened):
        ours = [step(batch)]
    ours += [step(batch) for _ in range(4)]
    changed = {(c.path, c.method) for c in step.plan.choices}
    assert changed != {(c.path, c.method) for c in step.tightenings[0].before.choices}
    step.undo()
    assert ours == losses
    assert State.of(step.host.model, step.host.optimizer).differences(expected) == []
    assert not any("forward" in vars(m) for m in model.modules())


def test_where_no_plan_is_leaner_the_next_step_is_refused_and_everything_is_whole(profile):
    model, optimizer, batch = stack()
    torch.manual_seed(3)
    loss = plain_step(model, optimizer, squares, batch)
    expected = State.of(model, optimizer)
    budget = budget_of(profile)
    step, batch = applied(profile, hiding(200_000), budget)
    torch.manual_seed(3)
    assert step(batch) == loss  # the step itself is done
    for _ in range(2):
        with pytest.raises(BudgetError, match="no plan is that much leaner") as caught:
            step(batch)
        assert caught.value.smallest_bytes > budget
    assert step.num_steps == 1
    step.undo()
    assert State.of(step.host.model, step.host.optimizer).differences(expected) == []
    enough = int(caught.value.smallest_bytes * 1.05)  # it says about what would do
    step, batch = applied(profile, hiding(200_000), enough)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PlanTightened)
        step(batch), step(batch)
        assert measured_peak(step, batch) <= enough


def test_the_smallest_peak_has_no_budget_to_keep(profile):
    step, batch = applied(profile, hiding(40_000), "min")
    step(batch), step(batch)
    assert not step.tightenings
    assert step.history[0].over_bytes > 0


def test_a_loss_of_nan_is_not_counted_among_the_measured(profile):
    step, batch = applied(profile, squares, budget_of(profile))
    with pytest.raises(slimgrad.SlimgradError, match="nan"):
        step(torch.full_like(batch, float("nan")))
    assert not step.history
    step(batch), step(batch)
    assert len(step.history) == 2


def test_a_verified_step_measures_no_more_and_tells_how_it_was_tightened(profile):
    model, optimizer, batch = stack()
    budget = budget_of(profile)
    step = slimgrad.slim(
        model, optimizer, hiding(40_000), batch, budget=budget, exactness="bitwise"
    )
    assert step.report.passed
    assert step.report.within_budget
    (told,) = step.tightenings
    assert told.measured.step == 0
    assert step.plan.tightened_bytes == told.reserve_bytes
    step(batch)
    assert not step.history


def test_the_profile_of_another_model_is_refused(profile):
    model, optimizer, batch = stack(3)
    made = slimgrad.plan(slimgrad.measure(model, optimizer, squares, batch, limit_s=0.0), "100%")
    with pytest.raises(PlanError, match="the profile"):
        slimgrad.apply(made, model, optimizer, squares, profile=profile)
    slimgrad.apply(made, model, optimizer, squares).undo()  # nothing was left attached


@pytest.mark.parametrize("name", ["attention", "lstm", "conv_batchnorm"])
def test_other_methods_are_exchanged_between_steps(name, profile_of):
    """From plain to the leanest plan after one step: the state goes where the new plan keeps it."""
    profile = profile_of(name)
    plans = [
        slimgrad.plan(profile, budget, exactness="bitwise") for budget in ("100%", "min", "100%")
    ]
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    torch.manual_seed(3)
    losses = [plain_step(model, optimizer, loss_fn, batch) for _ in range(4)]
    expected = State.of(model, optimizer)
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    step = slimgrad.apply(plans[0], model, optimizer, loss_fn)
    torch.manual_seed(3)
    ours = [step(batch)]
    for plan in (*plans[1:], copy.deepcopy(plans[1])):
        step.change_to(plan)
        ours.append(step(batch))
    step.undo()
    assert ours == losses
    assert State.of(model, optimizer).differences(expected) == []


def test_an_exchange_that_fails_leaves_the_old_plan(profile, monkeypatch):
    model, optimizer, batch = stack()
    made = slimgrad.plan(profile, "100%", exactness="bitwise")
    leaner = slimgrad.plan(profile, "min", exactness="bitwise")
    step = slimgrad.apply(made, model, optimizer, squares)
    last = catalogue.methods()[leaner.choices[-1].method]
    monkeypatch.setattr(last, "attach", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step.change_to(leaner)
    assert step.plan is made
    step(batch)
    step.undo()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_allocators_peak_is_measured():
    model, _, batch = stack()
    model, batch = model.cuda(), batch.cuda()
    step = slimgrad.slim(
        model, adamw(model), squares, batch, budget="100%", verify=False, exactness="bitwise"
    )
    step(batch)
    assert step.history[0].peak_bytes >= step.plan.peak_bytes // 2
