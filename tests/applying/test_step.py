"""A step under a plan trains to the bits of plain training, and undone leaves nothing behind."""

import copy

import numpy as np
import pytest
import torch
from tests.hand_plans import hand_plan, on_model, recomputed
from tests.sample_models import SAMPLES, adamw
from torch import nn
from torch.optim.lr_scheduler import StepLR

import slimgrad
from slimgrad.errors import BudgetError, PlanError
from slimgrad.measuring.blocks import cut

MEASURED = ["residual_conv", "conv_batchnorm", "counting_buffer", "frozen_layer"]
REPLAYED = [*MEASURED, "mlp", "attention", "lstm", "tied", "shared_twice", "in_place"]
REPLAYED += ["non_contiguous", "autocast"]
UPDATES = ["update_in_backward", "offload_gradients", "offload_state"]


def made(name):
    model, loss_fn, batch = SAMPLES[name].make()
    return model, adamw(model), loss_fn, batch


def plain_steps(model, optimizer, loss_fn, batch, num=4, clip=None):
    losses = []
    for _ in range(num):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def flat(value, path=""):
    """Every leaf of nested dicts and lists by path."""
    if isinstance(value, dict):
        return {k: v for n, x in value.items() for k, v in flat(x, f"{path}.{n}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for n, x in enumerate(value) for k, v in flat(x, f"{path}.{n}").items()}
    return {path: value}


def same(ours, theirs):
    ours, theirs = flat(ours), flat(theirs)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[key].dtype == value.dtype, key
            assert torch.equal(ours[key], value), key
        else:
            assert ours[key] == value, key


def assert_trains_alike(name, make_plan, num=4, clip=None):
    """``num`` planned steps, then undo, then one plain step: all as in plain training. Returns the plan."""
    plain = made(name)
    torch.manual_seed(5)
    losses = plain_steps(*plain, num=num, clip=clip)
    random = torch.get_rng_state()
    losses += plain_steps(*plain, num=1, clip=clip)

    model, optimizer, loss_fn, batch = made(name)
    plan = make_plan(model, optimizer, loss_fn, batch)
    step = slimgrad.apply(plan, model, optimizer, loss_fn, clip_grad_norm=clip)
    torch.manual_seed(5)
    found = [float(step(batch)) for _ in range(num)]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    step.undo()
    assert not any("forward" in vars(m) for m in model.modules())
    found += plain_steps(model, optimizer, loss_fn, batch, num=1, clip=clip)
    assert found == losses
    same(model.state_dict(), plain[0].state_dict())
    same(optimizer.state_dict(), plain[1].state_dict())
    return plan


@pytest.fixture(scope="module")
def profiles():
    found = {}

    def profile(name, objects):
        if name not in found:
            found[name] = slimgrad.measure(*objects)
        return found[name]

    return profile


@pytest.mark.parametrize("budget", ["75%", "50%", "min"])
@pytest.mark.parametrize("name", MEASURED)
def test_a_bitwise_plan_trains_to_the_same_bits(name, budget, profiles):
    def planned(*objects):
        profile = profiles(name, objects)
        try:
            return slimgrad.plan(profile, budget, exactness="bitwise")
        except BudgetError as error:
            smallest = error.smallest_bytes
        limit = int(float(budget[:-1]) / 100 * profile.peak_bytes)
        assert limit < smallest < profile.peak_bytes
        return slimgrad.plan(profile, smallest, exactness="bitwise")

    plan = assert_trains_alike(name, planned)
    assert plan.choices
    assert plan.peak_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", REPLAYED)
def test_recomputing_every_block_trains_to_the_same_bits(name):
    assert_trains_alike(
        name, lambda model, optimizer, *_: hand_plan(model, optimizer, *recomputed(model))
    )


@pytest.mark.parametrize("method", UPDATES)
@pytest.mark.parametrize("name", ["tied", "frozen_layer", "shared_twice"])
def test_a_method_of_the_update_trains_to_the_same_bits(name, method):
    def planned(model, optimizer, *_):
        return hand_plan(model, optimizer, *recomputed(model), on_model(method))

    assert_trains_alike(name, planned)


@pytest.mark.parametrize("methods", [(), ("offload_gradients",), ("offload_state",)])
def test_clipping_is_that_of_torch(methods):
    def planned(model, optimizer, *_):
        chosen = map(on_model, methods)
        return hand_plan(model, optimizer, *recomputed(model), *chosen, clip_grad_norm=0.05)

    assert_trains_alike("tied", planned, clip=0.05)


def test_the_clipping_of_another_plan_is_refused():
    model, optimizer, loss_fn, _ = made("mlp")
    with pytest.raises(PlanError, match="clip_grad_norm"):
        slimgrad.apply(hand_plan(model, optimizer), model, optimizer, loss_fn, clip_grad_norm=1.0)


def test_gradients_are_plain_again_after_undo():
    model, optimizer, loss_fn, batch = made("attention")
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    step = slimgrad.apply(
        hand_plan(model, optimizer, *recomputed(model), on_model("update_in_backward")),
        model,
        optimizer,
        loss_fn,
    )
    assert any("forward" in vars(m) for m in model.modules())
    assert list(model.state_dict()) == keys
    step.undo()
    for trained in (model, twin):
        torch.manual_seed(3)
        loss_fn(trained, batch).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(len(p._post_accumulate_grad_hooks or ()) == 0 for p in model.parameters())
    with pytest.raises(PlanError, match="undone"):
        step(batch)


def test_a_step_used_as_a_context_undoes_itself():
    model, optimizer, loss_fn, batch = made("mlp")
    plan = hand_plan(model, optimizer, *recomputed(model))
    with slimgrad.apply(plan, model, optimizer, loss_fn) as step:
        step(batch)
        with step.suspended():
            assert not any("forward" in vars(m) for m in model.modules())
        assert any("forward" in vars(m) for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_hooks_that_look_fire_once_a_call_under_recompute():
    model, optimizer, loss_fn, batch = made("mlp")
    calls = []
    for path in ("0", "0.0", "1", "1.2"):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda *_, path=path: calls.append(path))
        module.register_forward_pre_hook(lambda *_, path=path: calls.append(f"pre {path}"))
    plain_steps(model, optimizer, loss_fn, batch, num=1)
    expected = sorted(calls)
    assert len(expected) == 8
    step = slimgrad.apply(
        hand_plan(model, optimizer, *recomputed(model)), model, optimizer, loss_fn
    )
    for _ in range(2):
        calls.clear()
        step(batch)
        assert sorted(calls) == expected


def test_hooks_that_change_values_give_the_same_bits_under_recompute():
    results = []
    for plans in (False, True):
        model, optimizer, loss_fn, batch = made("mlp")
        model.get_submodule("1.0").register_forward_hook(lambda _m, _a, out: out * 1.5)
        choices = recomputed(model) if plans else ()
        step = slimgrad.apply(hand_plan(model, optimizer, *choices), model, optimizer, loss_fn)
        results.append([float(step(batch)) for _ in range(2)])
        results.append(model.state_dict())
    assert results[0] == results[2]
    same(results[1], results[3])


@pytest.mark.parametrize("methods", [(), ("update_in_backward",), ("offload_state",)])
def test_a_scheduler_made_before_or_after_counts_logical_steps(methods):
    runs = []
    for plans in (False, True):
        model, optimizer, loss_fn, batch = made("mlp")
        scheduler = StepLR(optimizer, 2, gamma=0.1)
        chosen = map(on_model, methods if plans else ())
        step = slimgrad.apply(hand_plan(model, optimizer, *chosen), model, optimizer, loss_fn)
        stepped = []
        optimizer.register_step_post_hook(lambda *_, seen=stepped: seen.append(1))
        for _ in range(5):
            step(batch) if plans else plain_steps(model, optimizer, loss_fn, batch, num=1)
            scheduler.step()
        assert len(stepped) == 5
        step.undo()
        runs.append((model.state_dict(), optimizer.state_dict()))
    same(runs[1], runs[0])


def test_the_users_own_loop_runs_under_a_plan_that_needs_no_step():
    plain = made("attention")
    torch.manual_seed(5)
    losses = plain_steps(*plain)
    model, optimizer, loss_fn, batch = made("attention")
    plan = hand_plan(model, optimizer, *recomputed(model))
    assert not plan.needs_step
    slimgrad.apply(plan, model, optimizer, loss_fn)
    torch.manual_seed(5)
    assert plain_steps(model, optimizer, loss_fn, batch) == losses
    same(model.state_dict(), plain[0].state_dict())
    same(optimizer.state_dict(), plain[1].state_dict())


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_batches_are_tensors_tuples_and_dicts(wrap):
    def loss_fn(model, batch):
        x = batch if isinstance(batch, torch.Tensor) else next(iter(flat(batch).values()))
        assert type(batch) is type(wrap(x))
        return model(x).square().mean()

    weights = []
    for plans in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)))
        optimizer, batch = adamw(model), wrap(torch.randn(4, 6))
        if plans:
            plan = hand_plan(model, optimizer, *recomputed(model))
            slimgrad.apply(plan, model, optimizer, loss_fn)(batch)
        else:
            plain_steps(model, optimizer, loss_fn, batch, num=1)
        weights.append(model.state_dict())
    same(weights[1], weights[0])


def test_batch_norm_counts_once_under_recompute():
    model, optimizer, loss_fn, batch = made("conv_batchnorm")
    plain = made("conv_batchnorm")
    plain_steps(*plain, num=3)
    step = slimgrad.apply(
        hand_plan(model, optimizer, *recomputed(model)), model, optimizer, loss_fn
    )
    for _ in range(3):
        step(batch)
    counts = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counts
    assert all(int(count) == 3 for count in counts)
    same(dict(model.named_buffers()), dict(plain[0].named_buffers()))


def test_python_and_numpy_random_states_are_replayed():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(self.layer(x)) * torch.from_numpy(np.random.rand(6)).float()

    states = []
    for plans in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(*(Noisy() for _ in range(3)))
        optimizer, batch = adamw(model), torch.randn(4, 6)
        assert len(cut(model)) == 3
        choices = recomputed(model) if plans else ()
        np.random.seed(3)
        plan = hand_plan(model, optimizer, *choices)
        step = slimgrad.apply(plan, model, optimizer, lambda m, b: m(b).square().mean())
        step(batch)
        states.append((model.state_dict(), float(np.random.rand())))
    same(states[1], states[0])


def test_batch_norm_counts_once_after_a_first_call_in_evaluation_mode():
    buffers = []
    for plans in (False, True):
        model, optimizer, loss_fn, batch = made("conv_batchnorm")
        choices = recomputed(model) if plans else ()
        slimgrad.apply(hand_plan(model, optimizer, *choices), model, optimizer, loss_fn)
        model.eval()
        plain_steps(model, optimizer, loss_fn, batch, num=1)
        model.train()
        plain_steps(model, optimizer, loss_fn, batch, num=2)
        buffers.append(dict(model.named_buffers()))
    same(buffers[1], buffers[0])
