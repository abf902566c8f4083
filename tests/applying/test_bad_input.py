"""Bad input gets one clear error of the tree, and nothing of the user's is left half changed."""

import copy
import json

import numpy as np
import pytest
import torch
from tests.hand_plans import hand_plan, on_model, recomputed
from tests.sample_models import SAMPLES, adamw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import slimgrad
from slimgrad.errors import (
    ArgumentError,
    BatchError,
    BudgetError,
    BudgetFormatError,
    FingerprintError,
    LossError,
    MethodError,
    ModelError,
    NonFiniteLoss,
    PlanError,
    UnsupportedError,
)
from slimgrad.methods.activations.recompute import Recompute


def small(num=3):
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(num)))
    return model, adamw(model), torch.randn(4, 6)


def squares(model, batch):
    return model(batch).square().mean()


def state_of(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def assert_unchanged(model, optimizer, before):
    weights, states = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    now = optimizer.state_dict()["state"]
    assert now.keys() == states.keys()
    for index, state in states.items():
        for key, value in state.items():
            assert torch.equal(now[index][key], value), (index, key)
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture(scope="module")
def profile():
    model, optimizer, batch = small()
    return slimgrad.measure(model, optimizer, squares, batch)


def test_a_budget_that_is_too_small_names_the_smallest_that_fits(profile):
    with pytest.raises(BudgetError, match="smallest peak") as caught:
        slimgrad.plan(profile, 1)
    smallest = caught.value.smallest_bytes
    assert 1 < smallest <= profile.peak_bytes
    assert slimgrad.plan(profile, smallest).peak_bytes <= smallest
    with pytest.raises(BudgetError):
        slimgrad.plan(profile, smallest - 1)


@pytest.mark.parametrize("budget", ["", "abc", "0", "-1GiB", "120%", 0, True, None])
def test_nonsense_budgets_are_refused(profile, budget):
    with pytest.raises(BudgetFormatError, match="memory budget"):
        slimgrad.plan(profile, budget)
    model, optimizer, batch = small()
    with pytest.raises(BudgetFormatError):
        slimgrad.slim(model, optimizer, squares, batch, budget=budget)


BAD_LOSSES = {
    "scalar": lambda model, batch: model(batch),
    "gradient": lambda model, batch: model(batch).mean().detach(),
    "tensor": lambda model, batch: float(model(batch).mean().detach()),
}


@pytest.mark.parametrize("match", BAD_LOSSES)
def test_a_loss_must_be_a_scalar_tensor_with_a_gradient(match):
    model, optimizer, batch = small()
    with pytest.raises(LossError, match=match):
        slimgrad.measure(model, optimizer, BAD_LOSSES[match], batch)


@pytest.mark.parametrize("match", BAD_LOSSES)
def test_a_loss_that_changes_its_kind_at_a_later_step_keeps_the_state(match):
    model, optimizer, batch = small()
    bad = [False]
    plan = hand_plan(model, optimizer, *recomputed(model), on_model("update_in_backward"))
    step = slimgrad.apply(
        plan,
        model,
        optimizer,
        lambda m, b: BAD_LOSSES[match](m, b) if bad[0] else squares(m, b),
    )
    step(batch)
    before = state_of(model, optimizer)
    bad[0] = True
    with pytest.raises(LossError, match=match):
        step(batch)
    assert_unchanged(model, optimizer, before)
    bad[0] = False
    step(batch)
    assert step.num_steps == 2


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (torch.empty(4, 6, device="meta"), "meta"),
        ({"x": torch.empty(0, 6)}, "empty"),
        ((), "no tensors"),
        ("words", "no tensors"),
        (np.ones((4, 6), np.float32), "from_numpy"),
        ({"x": np.ones((4, 6), np.float32)}, "from_numpy"),
    ],
)
def test_empty_batches_and_those_elsewhere_are_refused(batch, match):
    model, optimizer, good = small()
    with pytest.raises(BatchError, match=match):
        slimgrad.measure(model, optimizer, squares, batch)
    step = slimgrad.apply(hand_plan(model, optimizer), model, optimizer, squares)
    before = state_of(model, optimizer)
    with pytest.raises(BatchError, match=match):
        step(batch)
    assert_unchanged(model, optimizer, before)
    step(good)


def test_frozen_models_and_optimizers_of_others_are_refused():
    model, optimizer, batch = small()
    with pytest.raises(ModelError, match="optimizer holds no"):
        slimgrad.measure(model, adamw(small()[0]), squares, batch)
    model.requires_grad_(False)
    with pytest.raises(ModelError, match="requires a gradient"):
        slimgrad.measure(model, optimizer, squares, batch)


NAN_METHODS = {
    "plain": (),
    "update_in_backward": (on_model("update_in_backward"),),
    "micro_batches": (on_model("micro_batches", num=2),),
    "both": (on_model("micro_batches", num=2), on_model("update_in_backward")),
    "offload_gradients": (on_model("micro_batches", num=2), on_model("offload_gradients")),
}


@pytest.mark.parametrize("methods", NAN_METHODS)
def test_a_loss_of_nan_is_told_and_nothing_is_updated(methods):
    model, optimizer, batch = small()
    plan = hand_plan(model, optimizer, *recomputed(model), *NAN_METHODS[methods])
    step = slimgrad.apply(plan, model, optimizer, squares)
    step(batch)
    before = state_of(model, optimizer)
    spoilt = batch.clone()
    spoilt[-1, 0] = float("nan")  # in the last part alone
    with pytest.raises(NonFiniteLoss, match="step 2"):
        step(spoilt)
    assert_unchanged(model, optimizer, before)
    step(batch)
    after = state_of(model, optimizer)
    step.undo()

    twin, twins_optimizer, _ = small()
    step = slimgrad.apply(
        hand_plan(twin, twins_optimizer, *plan.choices), twin, twins_optimizer, squares
    )
    for _ in range(2):
        step(batch)
    assert_unchanged(twin, twins_optimizer, after)  # the failed step left no trace in the next


def test_a_plan_for_another_model_is_refused():
    model, optimizer, _ = small()
    other, others_optimizer, _ = small(4)
    plan = hand_plan(model, optimizer, *recomputed(model))
    with pytest.raises(FingerprintError, match="made for"):
        slimgrad.apply(plan, other, others_optimizer, squares)
    with pytest.raises(FingerprintError):
        slimgrad.apply(plan, model, torch.optim.SGD(model.parameters()), squares)
    assert not any("forward" in vars(m) for m in (*other.modules(), *model.modules()))


def test_an_optimizer_that_needs_a_closure_is_refused():
    model, _, batch = small()
    with pytest.raises(UnsupportedError, match="closure"):
        slimgrad.measure(model, torch.optim.LBFGS(model.parameters()), squares, batch)


def test_an_attachment_that_fails_undoes_those_before_it(monkeypatch):
    model, optimizer, batch = small()
    attach, calls = Recompute.attach, []

    def failing(self, block):
        calls.append(block.path)
        if len(calls) == 3:
            assert any("forward" in vars(m) for m in model.modules())
            raise RuntimeError("the third fails")
        return attach(self, block)

    monkeypatch.setattr(Recompute, "attach", failing)
    plan = hand_plan(model, optimizer, on_model("update_in_backward"), *recomputed(model))
    with pytest.raises(RuntimeError, match="third"):
        slimgrad.apply(plan, model, optimizer, squares)
    assert not any("forward" in vars(m) for m in model.modules())
    before = state_of(model, optimizer)
    squares(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())  # nothing updates and frees it
    model.zero_grad()
    assert_unchanged(model, optimizer, before)


def test_wrappers_that_exchange_gradients_are_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = DistributedDataParallel(small()[0])
    optimizer = adamw(model)
    with pytest.raises(UnsupportedError, match="inner module"):
        slimgrad.apply(hand_plan(model, optimizer), model, optimizer, squares)


def test_plans_cut_short_are_refused(tmp_path):
    model, optimizer, _ = small()
    plan = hand_plan(model, optimizer, *recomputed(model))
    path = tmp_path / "plan.json"
    plan.save(path)
    assert slimgrad.Plan.load(path) == plan
    text = path.read_text()
    for length in range(0, len(text) - 2, 37):
        path.write_text(text[:length])
        with pytest.raises(PlanError, match=r"plan\.json"):
            slimgrad.Plan.load(path)
    for other in ("[]", "{}", "null", '{"format": 1}', text.replace('"format": 1', '"format": 99')):
        path.write_text(other)
        with pytest.raises(PlanError):
            slimgrad.Plan.load(path)
    with pytest.raises(PlanError):
        slimgrad.Plan.load(tmp_path / "absent.json")


def test_methods_that_are_unknown_are_refused(profile):
    with pytest.raises(MethodError, match="did you mean 'recompute'"):
        slimgrad.plan(profile, "min", allow=["recomput"])
    with pytest.raises(PlanError, match="exactness"):
        slimgrad.plan(profile, "min", exactness="perfect")


def test_measuring_changes_nothing():
    model, loss_fn, batch = SAMPLES["counting_buffer"].make()
    optimizer = adamw(model)
    before, buffers = state_of(model, optimizer), [id(b) for b in model.buffers()]
    random = torch.get_rng_state()
    slimgrad.measure(model, optimizer, loss_fn, batch)
    assert_unchanged(model, optimizer, before)
    assert [id(b) for b in model.buffers()] == buffers
    assert torch.equal(torch.get_rng_state(), random)


def test_a_second_plan_on_one_model_is_refused():
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = hand_plan(model, optimizer)
    step = slimgrad.apply(plan, model, optimizer, lambda m, b: m(b).sum())
    for again in (
        lambda: slimgrad.apply(plan, model, optimizer, lambda m, b: m(b).sum()),
        lambda: slimgrad.slim(model, optimizer, lambda m, b: m(b).sum(), batch, budget="min"),
    ):
        with pytest.raises(PlanError, match="undo"):
            again()
    step.undo()
    slimgrad.apply(plan, model, optimizer, lambda m, b: m(b).sum()).undo()


@pytest.mark.parametrize("clip", [0, -1.0, float("nan"), float("inf"), "a"])
def test_a_clipping_norm_that_is_none_is_refused(clip):
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    profile = slimgrad.measure(model, optimizer, lambda m, b: m(b).sum(), batch, limit_s=0.0)
    with pytest.raises(PlanError, match="clip_grad_norm"):
        slimgrad.plan(profile, "min", clip_grad_norm=clip)


STAGES = {
    "slim": lambda *objects: slimgrad.slim(*objects, torch.randn(4, 6), budget="min"),
    "measure": lambda *objects: slimgrad.measure(*objects, torch.randn(4, 6)),
    "apply": lambda *objects: slimgrad.apply(hand_plan(*small()[:2]), *objects),
}


@pytest.mark.parametrize("stage", STAGES)
def test_arguments_in_each_others_place_are_told(stage):
    model, optimizer, _ = small()
    for objects, match in (
        ((optimizer, model, squares), "each other's place"),
        ((model, squares, optimizer), "torch.optim.Optimizer or None.*function"),
        ((squares, optimizer, model), "torch.nn.Module for the model, found function"),
        ((model, optimizer, torch.ones(2)), "function for loss_fn, found Tensor"),
    ):
        with pytest.raises(ArgumentError, match=match):
            STAGES[stage](*objects)
        with pytest.raises(TypeError):
            STAGES[stage](*objects)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(UnsupportedError, match="bfloat16"):
        STAGES[stage](model, scaler, squares)


def test_a_loss_that_fails_is_told_plainly():
    def failing(model, batch):
        return model(batch.flatten()).square().mean()

    model, optimizer, batch = small()
    with pytest.raises(LossError, match="forward and backward pass of loss_fn failed"):
        slimgrad.measure(model, optimizer, failing, batch)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, optimizer, _ = small()
    with pytest.raises(LossError, match="failed on fake tensors"):
        slimgrad.measure(model, optimizer, failing, batch)


class Root(nn.Module):
    """Its value at 0 is finite, its derivative there is not."""

    def forward(self, x):
        return (x * 0).abs().sqrt()


@pytest.mark.parametrize("budget", ["90%", "min", "1%"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_first_batch_whose_loss_is_no_number_is_told_as_that(budget, verify):
    model, optimizer, batch = small()
    before = state_of(model, optimizer)
    batch[-1, 0] = float("nan")
    if verify or budget == "1%":
        with pytest.raises(NonFiniteLoss, match="sample batch"):
            slimgrad.slim(model, optimizer, squares, batch, budget=budget, verify=verify)
    else:
        step = slimgrad.slim(model, optimizer, squares, batch, budget=budget, verify=verify)
        with pytest.raises(NonFiniteLoss, match="step 1"):
            step(batch)
        step.undo()
    assert_unchanged(model, optimizer, before)
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("trains", [True, False])
def test_a_first_batch_whose_gradient_is_no_number_is_told_as_that(trains):
    model, _, batch = small()
    model.append(Root())
    optimizer = adamw(model)
    before = state_of(model, optimizer)
    with pytest.raises(NonFiniteLoss, match=r"gradient"):
        slimgrad.slim(model, optimizer if trains else None, squares, batch, budget="min")
    assert_unchanged(model, optimizer, before)


def test_keys_of_a_plan_file_are_told_in_plain_words(tmp_path):
    model, optimizer, _ = small()
    path = tmp_path / "plan.json"
    hand_plan(model, optimizer, *recomputed(model)).save(path)
    data = json.loads(path.read_text())
    first = data["choices"][0]
    without = {k: v for k, v in data.items() if k != "fingerprint"}
    for broken, match in (
        (data | {"budjet": 1}, "the plan has an unknown key 'budjet'; did you mean 'budget'"),
        (without, "the plan lacks the key 'fingerprint'"),
        (data | {"choices": [first | {"wher": 1}]}, "choice 1 has an unknown key 'wher'"),
        (data | {"choices": [{"path": "0", "fields": {}}]}, "choice 1 lacks the key 'method'"),
        (data | {"choices": ["recompute"]}, "choice 1 must be an object"),
        (data | {"choices": "recompute"}, "'choices' must be a list"),
        (data | {"batch_shapes": {"x": 3}}, "not a plan"),
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(PlanError, match=match) as caught:
            slimgrad.Plan.load(path)
        assert "KeyError" not in str(caught.value)
