"""Every sample model, five steps under a plan: the bits of plain training, and nothing left after undo."""

import pytest
from tests.hand_made_plans import block_paths, hand_made, micro_batched
from tests.plain_training import State, instance_attributes, plain_step
from tests.sample_models import SAMPLES, adamw

from slimgrad import apply

STEPS = 5
METHODS = ["update_in_backward", "offload_state"]


def _trained(name, step_of=None, steps=STEPS):
    """Losses, final state and model after some steps; ``step_of(model, optimizer, loss_fn)`` None: plainly."""
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    if step_of is None:
        losses = [plain_step(model, optimizer, loss_fn, batch) for _ in range(steps)]
    else:
        with step_of(model, optimizer, loss_fn) as step:
            losses = [step(batch) for _ in range(steps)]
    return [float(loss) for loss in losses], model, optimizer


def _assert_same_bits(name, plan):
    import torch

    torch.manual_seed(11)
    losses, model, optimizer = _trained(name)
    expected = State.of(model, optimizer)
    torch.manual_seed(11)
    ours, model, optimizer = _trained(name, lambda *mine: apply(plan, *mine))
    assert ours == losses
    assert State.of(model, optimizer).differences(expected) == []


@pytest.mark.parametrize("name", SAMPLES)
def test_recomputation_and_updates_in_backward_train_to_the_same_bits(profile_of, name):
    profile = profile_of(name)
    _assert_same_bits(name, hand_made(profile, block_paths(profile), on_model=METHODS[:1]))


@pytest.mark.parametrize("name", ["attention", "autocast", "tied", "llama", "frozen_layer"])
def test_with_the_state_outside_the_device_too(profile_of, name):
    profile = profile_of(name)
    _assert_same_bits(name, hand_made(profile, block_paths(profile)[::2], on_model=METHODS))


@pytest.mark.parametrize("name", SAMPLES)
def test_undo_leaves_nothing(profile_of, name):
    profile = profile_of(name)
    parts = 2 if micro_batched(profile, 2) is not None else 1
    plan = hand_made(
        profile, block_paths(profile), variant=micro_batched(profile, parts), on_model=METHODS
    )
    model, loss_fn, batch = SAMPLES[name].make()
    optimizer = adamw(model)
    plain_step(model, optimizer, loss_fn, batch)
    attributes, keys = instance_attributes(model), list(model.state_dict())
    hooks = {n: len(p._post_accumulate_grad_hooks or {}) for n, p in model.named_parameters()}
    step = apply(plan, model, optimizer, loss_fn)
    step(batch)
    step.undo()
    step.undo()  # the second time does nothing
    assert instance_attributes(model) == attributes
    assert list(model.state_dict()) == keys
    for n, p in model.named_parameters():
        assert len(p._post_accumulate_grad_hooks or {}) == hooks[n]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert getattr(getattr(model, "config", None), "use_cache", True)


@pytest.mark.parametrize("name", ["conv_batchnorm", "gpt2", "shared_twice", "counting_buffer"])
def test_training_goes_on_plainly_after_undo(profile_of, name):
    """Three steps under a plan and two plain ones are five plain ones."""
    import torch

    profile = profile_of(name)
    plan = hand_made(profile, block_paths(profile), on_model=METHODS)
    _, _, batch = SAMPLES[name].make()
    loss_fn = SAMPLES[name].make()[1]
    torch.manual_seed(5)
    losses, model, optimizer = _trained(name)
    expected = State.of(model, optimizer)
    torch.manual_seed(5)
    ours, model, optimizer = _trained(name, lambda *mine: apply(plan, *mine), steps=3)
    ours += [float(plain_step(model, optimizer, loss_fn, batch)) for _ in range(2)]
    assert ours == losses
    assert State.of(model, optimizer).differences(expected) == []
