"""Every sample model under recomputation passes verification, which changes nothing."""

import pytest
from tests.hand_made_plans import block_paths, hand_made, micro_batched
from tests.plain_training import State, plain_step
from tests.sample_models import SAMPLES, adamw

from slimgrad import apply, verify
from slimgrad.types import Exactness


def _verified(name, plan, **options):
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    plain_step(model, optimizer, loss_fn, batch)
    step = apply(plan, model, optimizer, loss_fn)
    before = State.of(model, optimizer)
    report = verify(step, batch, time_pairs=0, **options)
    assert State.of(model, optimizer).differences(before) == []
    assert not step.num_steps or step.report is None
    step.undo()
    return report


@pytest.mark.parametrize("name", SAMPLES)
def test_recomputation_and_updates_in_backward_pass(profile_of, name):
    profile = profile_of(name)
    plan = hand_made(profile, block_paths(profile), on_model=["update_in_backward"])
    report = _verified(name, plan)
    assert report.passed, report
    assert report.rung is Exactness.BITWISE
    assert report.mode == "step"
    assert report.gradient_error == report.update_error == report.loss_error == 0.0
    assert report.buffers_equal
    assert report.random_equal
    assert report.control_failed
    assert 0.995 * report.peak_bytes <= report.predicted_peak_bytes <= 1.03 * report.peak_bytes


@pytest.mark.parametrize(
    "name", [n for n in SAMPLES if n not in ("conv_batchnorm", "counting_buffer")]
)
def test_micro_batches_pass_by_the_measure_of_float64(profile_of, name):
    profile = profile_of(name)
    plan = hand_made(profile, block_paths(profile)[:1], variant=micro_batched(profile, 2))
    report = _verified(name, plan)
    assert report.passed, report
    assert report.rung is Exactness.EXACT
    assert report.control_failed
    assert report.gradient_error < 1e-2 if name == "autocast" else report.gradient_error < 1e-5


@pytest.mark.parametrize("name", SAMPLES)
def test_blocks_pass_where_the_plain_step_does_not_fit(profile_of, name):
    profile = profile_of(name)
    plan = hand_made(profile, block_paths(profile), on_model=["update_in_backward"])
    report = _verified(name, plan, available_bytes=0)
    assert report.passed, report
    assert report.mode == "blocks"
    assert report.control_failed
