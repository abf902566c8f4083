"""A batch larger than planned for is looked at before it is run: it fits, is split, or is refused; nothing is run for it."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hand_plans import hand_plan
from tests.plain_training import State, plain_step
from tests.sample_models import adamw
from torch import nn
from torch.nn import functional

import slimgrad
from slimgrad.applying import guard
from slimgrad.batches import is_within, shapes_from_json
from slimgrad.errors import (
    BatchSplit,
    BatchTooLarge,
    BatchUnchecked,
    BudgetError,
    LossError,
    PlanError,
)
from slimgrad.measuring.fake import is_fake

WORDS, WIDTH = 60, 24
PLANNED = (4, 12)


class Reader(nn.Module):
    """A small model of words that counts its real runs, not those on fake tensors."""

    def __init__(self, norm=False):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        make = [lambda: nn.Linear(WIDTH, 48), nn.Tanh, lambda: nn.Linear(48, WIDTH)]
        self.blocks = nn.ModuleList(nn.Sequential(*(m() for m in make)) for _ in range(4))
        self.norm = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, WORDS)
        self.num_runs = 0

    def forward(self, words):
        self.num_runs += not is_fake(self.head.weight)
        h = self.embed(words)
        for block in self.blocks:
            h = h + block(h)
        return self.head(self.norm(h.transpose(1, 2)).transpose(1, 2))


def loss_fn(model, batch):
    logits = model(batch["words"]).transpose(1, 2)
    return functional.cross_entropy(logits, batch["targets"])


def made(norm=False, dtype=torch.float64):
    torch.manual_seed(4)
    model = Reader(norm).to(dtype)
    return model, adamw(model), loss_fn


def words(num, length, *, ragged=False):
    generator = torch.Generator().manual_seed(100 * num + length)
    drawn = torch.randint(WORDS, (num, length), generator=generator)
    targets = drawn.roll(-1, 1)
    if ragged:  # sample i has i + 1 targets that count
        for i in range(num):
            targets[i, i + 1 :] = -100
    return {"words": drawn, "targets": targets}


@pytest.fixture(scope="module")
def profile():
    return slimgrad.measure(*made(), words(*PLANNED), limit_s=0.0)


def applied(profile, budget="60%", *, exactness="exact", objects=None, **kwargs):
    plan = slimgrad.plan(profile, budget, exactness=exactness)
    return slimgrad.apply(plan, *(objects or made()), **kwargs)


def assert_nothing_ran(step, before, num_runs):
    assert step.host.model.num_runs == num_runs
    assert State.of(step.host.model, step.host.optimizer).differences(before) == []


def test_a_plan_knows_its_batch(profile, tmp_path):
    plan = slimgrad.plan(profile, "60%")
    assert plan.batch_shapes == {"words": ("int64", PLANNED), "targets": ("int64", PLANNED)}
    plan.save(tmp_path / "plan.json")
    assert slimgrad.Plan.load(tmp_path / "plan.json") == plan
    profile.save(tmp_path / "profile.json")
    assert slimgrad.Profile.load(tmp_path / "profile.json").batch_shapes == plan.batch_shapes


@pytest.mark.parametrize("shape", [PLANNED, (2, 12), (4, 5), (1, 1)])
def test_a_batch_within_the_planned_one_is_never_traced(profile, shape, monkeypatch):
    def traced(*_):
        raise LossError("traced")

    monkeypatch.setattr(guard, "at_batch", traced)
    step = applied(profile)
    step(words(*shape))
    with pytest.raises(LossError, match="traced"):
        step(words(5, 13))


def test_a_batch_larger_than_planned_that_fits_is_run_as_it_is(profile):
    step = applied(profile, "100%")
    model = step.host.model
    step(words(4, 11))
    peak = _peak(step, words(3, 14))
    assert model.num_runs == 4
    assert peak <= step.plan.budget_bytes


@pytest.mark.parametrize("shape", [(32, 12), (4, 100), (16, 40)])
def test_a_batch_that_does_not_fit_is_refused_before_anything_runs(profile, shape):
    step = applied(profile, on_larger="raise")
    step(words(*PLANNED))
    before, num_runs = State.of(step.host.model, step.host.optimizer), step.host.model.num_runs
    for _ in range(2):
        with pytest.raises(BatchTooLarge, match="larger than planned") as caught:
            step(words(*shape))
        assert_nothing_ran(step, before, num_runs)
    error = caught.value
    assert isinstance(error, BudgetError)
    assert error.predicted_bytes == error.smallest_bytes > step.plan.budget_bytes
    assert str(list(shape)) in str(error)
    fits = error.largest_batch_size
    if fits:
        assert _peak(step, words(fits, shape[1])) <= step.plan.budget_bytes
    with pytest.raises(BatchTooLarge):
        step(words(fits + 1, shape[1]))
    step(words(*PLANNED))


def _peak(step, batch, runs=3):
    """The measured peak of a step like all others."""
    for _ in range(runs - 1):
        step(batch)
    with step.ledger(batch) as ledger:
        step(batch)
    return ledger.peak_bytes


@pytest.mark.parametrize("budget", ["100%", "60%"])
@pytest.mark.parametrize("shape", [(24, 12), (9, 14)])
def test_it_is_split_into_the_fewest_parts_that_fit_and_updates_as_the_whole(
    profile, shape, budget
):
    batch = words(*shape, ragged=True)
    plain = made()
    expected = copy.deepcopy(plain[0])
    losses = [float(plain_step(*plain, batch)) for _ in range(3)]
    step = applied(profile, budget, on_larger="split")
    with pytest.warns(BatchSplit, match="micro-batches") as told:
        ours = [float(step(batch))]
    ours += [float(step(batch)) for _ in range(2)]  # told once
    assert [w.filename for w in told if w.category is BatchSplit] == [__file__]
    assert ours == pytest.approx(losses, rel=1e-12)
    start = list(expected.parameters())
    moved, error = 0.0, 0.0
    for ours_p, plain_p, first in zip(
        step.host.model.parameters(), plain[0].parameters(), start, strict=True
    ):
        moved += float((plain_p - first).detach().square().sum())
        error += float((ours_p - plain_p).detach().square().sum())
    assert (error / moved) ** 0.5 < 1e-9
    assert _peak(step, batch) <= step.plan.budget_bytes
    num = step._guard._known[next(iter(step._guard._known))].num_parts
    fewer = step._guard._predicted(batch, step.plan, num - 1)  # one less would not do
    assert fewer > step.plan.budget_bytes
    assert step._guard._predicted(batch, step.plan, num) <= step.plan.budget_bytes


def test_each_shape_is_looked_at_once(profile, monkeypatch):
    traces, at_batch = [], guard.at_batch
    monkeypatch.setattr(guard, "at_batch", lambda *a: traces.append(1) or at_batch(*a))
    step = applied(profile, 2 * profile.peak_bytes)
    step(words(5, 11))  # one dimension longer, but it fits
    assert len(traces) == 1
    step(words(5, 11)), step(words(5, 9)), step(words(*PLANNED))
    assert len(traces) == 1
    with pytest.warns(BatchSplit):
        step(words(32, 16))
    num = len(traces)
    assert num > 2
    step(words(32, 16))
    assert len(traces) == num


def test_what_cannot_be_split_says_why(profile):
    step = applied(profile, exactness="bitwise")
    assert step.plan.weighing is None
    with pytest.raises(BatchTooLarge, match="looser than bitwise"):
        step(words(32, 12))
    step.undo()
    objects = made(norm=True)
    normed = slimgrad.measure(*objects, words(*PLANNED), limit_s=0.0)
    step = applied(normed, "80%", objects=objects)
    with pytest.raises(BatchTooLarge, match="batch norm"):
        step(words(32, 12))
    step.undo()
    step = applied(profile)
    with pytest.raises(BatchTooLarge, match="single samples") as caught:
        step(words(2, 400))
    assert caught.value.largest_batch_size == 0


def test_no_batch_is_looked_at_where_that_is_not_wanted(profile):
    for kwargs, budget in (({"on_larger": "run"}, "60%"), ({}, "min")):
        step = applied(profile, budget, **kwargs)
        step(words(32, 12))
        step.undo()
    model, optimizer, _ = made()
    slimgrad.apply(hand_plan(model, optimizer), model, optimizer, loss_fn)(words(32, 12))
    with pytest.raises(PlanError, match="'split', 'raise', 'run'"):
        applied(profile, on_larger="cut")


def test_the_largest_batch_is_looked_at_beforehand(profile):
    objects = made()
    with pytest.raises(BatchTooLarge):
        applied(profile, objects=objects, on_larger="raise", largest_batch=words(32, 12))
    with pytest.warns(BatchSplit):
        step = applied(profile, objects=objects, largest_batch=words(32, 12))
    assert objects[0].num_runs == 0
    step(words(32, 12))
    with pytest.raises(PlanError, match="measure"):
        slimgrad.plan(profile, "60%", largest_batch=words(32, 12))
    assert slimgrad.plan(profile, "60%", largest_batch=words(2, 12)).choices


def test_slim_plans_for_the_largest_batch():
    objects = made()
    step = slimgrad.slim(
        *objects,
        words(*PLANNED),
        budget="60%",
        largest_batch=words(8, 20),
        on_larger="raise",
        verify=False,
    )
    assert step.plan.batch_shapes["words"] == ("int64", (8, 20))
    step(words(*PLANNED)), step(words(8, 20))
    with pytest.raises(BatchTooLarge):
        step(words(32, 20))


def test_what_fake_tensors_cannot_run_is_run_and_told(profile):
    def looking(model, batch):
        loss = loss_fn(model, batch)
        if is_fake(model.head.weight) and batch["words"].shape[0] > PLANNED[0]:
            float(loss.detach())  # only values tell
        return loss

    model, optimizer, _ = made()
    step = slimgrad.apply(slimgrad.plan(profile, "60%"), model, optimizer, looking)
    with pytest.warns(BatchUnchecked, match="fake tensors"):
        step(words(5, 12))
    step(words(5, 12))
    assert step.num_steps == 2


def test_a_tightened_plan_looks_again():
    """What fitted under the first plan does not under what measuring left of the budget."""
    held = []

    def hiding(model, batch):
        if not is_fake(model.head.weight) and hidden[0]:
            held[:] = [torch.zeros(hidden[0], dtype=torch.uint8)]
        return loss_fn(model, batch)

    hidden, batch = [0], words(5, 12)
    model, optimizer, _ = made()
    profile = slimgrad.measure(model, optimizer, hiding, words(*PLANNED), limit_s=0.0)
    made_plan = slimgrad.plan(profile, "60%")
    step = slimgrad.apply(made_plan, model, optimizer, hiding, profile=profile)
    needed = step._guard._predicted(batch, made_plan, None)
    budget = needed + 1000
    step.undo()
    made_plan = slimgrad.plan(profile, budget)
    step = slimgrad.apply(made_plan, model, optimizer, hiding, profile=profile)
    hidden[0] = budget - made_plan.peak_bytes + 5000
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            step(batch)
            assert step.plan.budget_bytes == budget
        assert _peak(step, batch) <= budget
    assert step.tightenings
    assert told


shapes = st.dictionaries(
    st.sampled_from("ab"),
    st.tuples(
        st.sampled_from(["int64", "float32"]),
        st.lists(st.integers(1, 4), max_size=3).map(tuple),
    ),
)


@given(shapes, shapes, shapes)
def test_to_be_within_is_an_order(one, two, three):
    assert is_within(one, one)
    if is_within(one, two) and is_within(two, three):
        assert is_within(one, three)
    if is_within(one, two) and is_within(two, one):
        assert one == two
    grown = {path: (dtype, tuple(n + 1 for n in shape)) for path, (dtype, shape) in one.items()}
    assert is_within(one, grown)
    assert is_within(grown, one) == (grown == one)
    assert shapes_from_json(json.loads(json.dumps(one))) == one


@settings(max_examples=12, deadline=None)
@given(num=st.integers(1, 20), length=st.integers(1, 40))
def test_whatever_comes_keeps_the_budget_or_is_refused(profile, num, length):
    objects = made()
    step = applied(profile, "70%", objects=objects)
    batch = words(num, length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchSplit)
        try:
            peak = _peak(step, batch)
        except BatchTooLarge:
            assert objects[0].num_runs == 0
        else:
            assert peak <= step.plan.budget_bytes
