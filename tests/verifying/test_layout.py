"""The layout of a step under a plan: what is born in it, by every rule, and nothing is left of the trial."""

import numpy as np
import pytest
import torch
from tests.sample_models import SAMPLES, adamw

import slimgrad
from slimgrad.verifying.layout import StepLayout, lay_out


@pytest.mark.parametrize("budget", ["100%", "50%"])
def test_a_step_is_laid_out_by_every_rule(budget):
    model, loss_fn, batch = SAMPLES["gpt2"].make()
    optimizer = adamw(model)
    profile = slimgrad.measure(model, optimizer, loss_fn, batch, allow_compile=False)
    plan = slimgrad.plan(profile, budget)
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        found = lay_out(step, batch)
        with step.ledger(batch) as ledger:
            step(batch)
    assert found.num_tensors > 50
    assert 0 < found.live_bytes < found.total_bytes
    assert found.live_bytes <= ledger.peak_bytes
    assert set(found.arenas) > {"first fit", "greedy by size", "greedy by breadth", "two levels"}
    assert min(found.arenas.values()) <= 1.05 * found.live_bytes
    assert all(above >= 0 for above in found.fragmentation.values())
    assert "live at once" in str(found)


def test_a_trial_changes_no_weight_no_state_and_no_random_number():
    model, loss_fn, batch = SAMPLES["gpt2"].make()
    optimizer = adamw(model)
    plan = slimgrad.plan(slimgrad.measure(model, optimizer, loss_fn, batch), "70%")
    before = [p.detach().clone() for p in model.parameters()]
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        torch.manual_seed(3)
        random = torch.get_rng_state()
        lay_out(step, batch)
        assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimizer.state


def test_the_report_in_words_and_as_data():
    found = StepLayout(3, 100, 300, {"greedy by size": 100, "first fit": 125})
    assert found.fragmentation == {"greedy by size": 0.0, "first fit": 0.25}
    assert "first fit" in str(found)
    assert "25.0% fragmentation" in str(found)
    assert found.to_json()["fragmentation"]["first fit"] == 0.25


def test_the_ledger_tells_lifetimes_of_what_was_born_inside():
    x = torch.zeros(16)
    with slimgrad.Ledger() as ledger:
        y = x + 1
        z = y * 2
        del y
        w = z + 1
    lifetimes = ledger.lifetimes
    assert lifetimes.nbytes.tolist() == [64, 64, 64]
    assert lifetimes.birth.tolist() == [1, 2, 3]
    assert lifetimes.death[0] == 3
    assert np.all(lifetimes.death[1:] > ledger.num_operations)
    assert w.sum() == 48
