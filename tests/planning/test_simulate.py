"""The simulator against the ledger: the same plans, replayed and applied for real."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.hand_made_plans import Refused, block_paths, hand_made, micro_batched
from tests.sample_models import SAMPLES, adamw

from slimgrad import apply
from slimgrad.types import Column

WITH_BLOCKS = [n for n in SAMPLES if n != "lstm"]
DRAWN = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def measured_peak(plan, name):
    """The ledger's peak of a step under ``plan``, the one after the optimizer's state was made."""
    model, loss_fn, batch = SAMPLES[name].make()
    with apply(plan, model, adamw(model), loss_fn) as step:
        step(batch)
        with step.ledger(batch) as ledger:
            step(batch)
    return ledger


def assert_predicted(plan, ledger):
    """Within 3 % above, never more than half a percent below."""
    what = [(c.path, c.method) for c in plan.choices]
    assert plan.peak_bytes >= 0.995 * ledger.peak_bytes, what
    assert plan.peak_bytes <= 1.03 * ledger.peak_bytes, what
    assert sum(plan.columns.values()) == plan.peak_bytes == plan.timeline.peak_bytes


@pytest.mark.parametrize("name", WITH_BLOCKS)
@DRAWN
@given(data=st.data())
def test_recomputed_blocks_updates_and_micro_batches(profile_of, name, data):
    profile = profile_of(name)
    paths = data.draw(st.sets(st.sampled_from(block_paths(profile))), "recomputed")
    during = data.draw(st.booleans(), "updates during backward")
    parts = [n for n in (1, 2, 4) if micro_batched(profile, n) is not None]
    variant = micro_batched(profile, data.draw(st.sampled_from(parts), "parts"))
    plan = hand_made(
        profile, sorted(paths), variant=variant, on_model=["update_in_backward"] * during
    )
    assert_predicted(plan, measured_peak(plan, name))


@pytest.mark.parametrize("during", [False, True], ids=["after", "during"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_a_flat_model(profile_of, parts, during):
    profile = profile_of("lstm")
    plan = hand_made(
        profile,
        variant=micro_batched(profile, parts),
        on_model=["update_in_backward"] * during,
    )
    assert_predicted(plan, measured_peak(plan, "lstm"))


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_nothing_chosen_is_the_plain_step(profile_of, name):
    plan = hand_made(profile_of(name))
    assert not plan.choices
    assert_predicted(plan, measured_peak(plan, name))


def test_columns_are_predicted_one_by_one(profile_of):
    profile = profile_of("mlp")
    plan = hand_made(profile, ["0", "2"], on_model=["update_in_backward"])
    ledger = measured_peak(plan, "mlp")
    predicted = {c: int(live.max()) for c, live in plan.timeline.columns.items()}
    for column in (Column.WEIGHTS, Column.GRADIENTS, Column.INPUTS, Column.ACTIVATIONS):
        assert predicted[column] == pytest.approx(ledger.columns[column], rel=0.01), column
    assert plan.timeline.columns[Column.ACTIVATIONS].max() < profile.columns[Column.ACTIVATIONS]


def test_recomputing_a_block_frees_what_it_saves_between_its_passes(profile_of):
    """At the turn from forward to backward the freed bytes are the block's own, by closed form."""
    profile = profile_of("mlp")

    def at_turn(paths):
        timeline = hand_made(profile, paths).timeline
        turn = next(slot for slot, mark in timeline.marks if mark == "backward begins")
        return int(timeline.columns[Column.ACTIVATIONS][turn])

    inside = 2 * 4 * (4 * 16) * 96  # what gelu takes and what it makes
    plain = at_turn([])
    assert plain - at_turn(["1"]) == inside
    assert plain - at_turn(["1", "2"]) == 2 * inside


def test_depth_costs_inputs_only():
    """Recomputed blocks of equal size: each more adds its input, not what it saves."""
    import torch
    from torch import nn

    from slimgrad import measure

    def activations(depth):
        blocks = [
            nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 16)) for _ in range(depth)
        ]
        model, x = nn.Sequential(*blocks), torch.randn(8, 16)
        profile = measure(model, None, lambda m, b: m(b).square().mean(), x, limit_s=0.0)
        plan = hand_made(profile, block_paths(profile))
        return int(plan.timeline.columns[Column.ACTIVATIONS].max())

    four, eight, sixteen = activations(4), activations(8), activations(16)
    assert eight - four == 4 * (4 * 8 * 16)
    assert sixteen - eight == 8 * (4 * 8 * 16)


def test_a_method_that_refuses_says_why(profile_of):
    with pytest.raises(Refused, match="clipping") as caught:
        hand_made(profile_of("mlp"), on_model=["update_in_backward"], clip_grad_norm=1.0)
    assert caught.value.method == "update_in_backward"
