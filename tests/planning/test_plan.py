"""Plans: budgets, rungs, refusals, what does not fit, and JSON."""

import itertools
import json

import pytest
from tests.hand_made_plans import hand_made, micro_batched
from tests.sample_models import SAMPLES

from slimgrad import BudgetError, Plan, catalogue, plan
from slimgrad.errors import BudgetFormatError, MethodError, PlanError
from slimgrad.types import Column, Exactness

SOME = ["counting_buffer", "non_contiguous"]


@pytest.fixture(scope="module")
def leanest(profile_of):
    """``leanest(name, rung)``: the plan with the lowest peak, made once."""
    found = {}

    def of(name, exactness="exact"):
        if (name, exactness) not in found:
            found[name, exactness] = plan(profile_of(name), "min", exactness=exactness)
        return found[name, exactness]

    return of


# -- budgets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_plans_fit_and_more_budget_never_costs_more_time(profile_of, leanest, name):
    profile = profile_of(name)
    low, high = leanest(name).peak_bytes, profile.peak_bytes
    budgets = [int(low + share * (high - low)) for share in (0.0, 0.1, 0.3, 0.6, 0.8, 1.0)]
    plans = [plan(profile, budget) for budget in budgets]
    for made, budget in zip(plans, budgets, strict=True):
        assert made.peak_bytes <= budget == made.budget_bytes
        assert sum(made.columns.values()) == made.peak_bytes == made.timeline.peak_bytes
        assert made.plain_peak_bytes == profile.peak_bytes
    for less, more in itertools.pairwise(plans):
        assert more.seconds <= less.seconds * (1 + 1.1e-3)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in ("gpt2", "llama")])
def test_the_whole_peak_is_enough_for_plain_training(profile_of, name):
    made = plan(profile_of(name), "100%", exactness="bitwise")
    assert made.choices == ()
    assert made.peak_bytes == profile_of(name).peak_bytes
    assert made.loosest is Exactness.BITWISE
    assert made.needs_step == ()


def test_ways_to_write_a_budget(profile_of):
    profile = profile_of("mlp")
    kib = profile.peak_bytes // 1024
    for budget in (kib * 1024, f"{kib}KiB", f" {kib} kib ", f"{kib / 1024:.9f}MiB"):
        assert plan(profile, budget).budget_bytes == pytest.approx(kib * 1024, abs=1)
    assert plan(profile, "90%").budget_bytes == int(0.9 * profile.peak_bytes)
    assert plan(profile, "1.5GiB").budget_bytes == 1610612736
    assert plan(profile, "2GB").budget_bytes == 2 * 10**9


@pytest.mark.parametrize(
    "budget",
    [0, -1, True, 1.5, None, "", "  ", "much", "-1GiB", "0", "0%", "101%", "1.5XiB", "GiB", "%", "nan",
     "inf", "1e999GiB", [1], "1 2", "0.1"],
)  # fmt: skip
def test_nonsense_budgets(profile_of, budget):
    with pytest.raises(BudgetFormatError, match="cannot read") as caught:
        plan(profile_of("tied"), budget)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("exactness", ["bitwise", "exact"])
@pytest.mark.parametrize("name", ["lstm", "counting_buffer"])
def test_what_does_not_fit_is_told_with_the_smallest_peak_that_does(
    profile_of, leanest, name, exactness
):
    profile = profile_of(name)
    smallest = leanest(name, exactness).peak_bytes
    for budget in (1, smallest - 1):
        with pytest.raises(BudgetError, match="no plan fits") as caught:
            plan(profile, budget, exactness=exactness)
        assert caught.value.smallest_bytes == smallest
        assert str(smallest) in str(caught.value)
    reached = plan(profile, smallest, exactness=exactness)
    assert reached.peak_bytes <= smallest


def test_looser_rungs_are_named_where_they_would_fit(profile_of, leanest):
    with pytest.raises(BudgetError) as caught:
        plan(profile_of("lstm"), 1, exactness="bitwise")
    by_rung = caught.value.by_rung
    assert by_rung["exact"] == leanest("lstm").peak_bytes < caught.value.smallest_bytes
    assert "exactness='exact'" in str(caught.value)
    for rung, smallest in by_rung.items():
        assert plan(profile_of("lstm"), smallest, exactness=rung).peak_bytes <= smallest


def test_reserved_bytes_are_kept_free(profile_of):
    profile = profile_of("mlp")
    limit, reserve = int(0.9 * profile.peak_bytes), int(0.1 * profile.peak_bytes)
    made = plan(profile, limit, reserve_bytes=reserve)
    assert made.peak_bytes <= limit - reserve
    assert made.budget_bytes == limit


# -- rungs and refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_bitwise_plans_hold_bitwise_methods_only(leanest, name):
    made = leanest(name, "bitwise")
    assert made.choices
    assert {catalogue.get(c.method).exactness for c in made.choices} == {Exactness.BITWISE}
    assert made.loosest is Exactness.BITWISE
    for method, cls in catalogue.methods().items():
        if not Exactness.BITWISE.allows(cls.exactness):
            assert "looser than bitwise" in made.refusals[method]


def test_a_looser_rung_never_has_a_higher_peak(leanest):
    for name in ("mlp", "lstm"):
        assert leanest(name).peak_bytes <= leanest(name, "bitwise").peak_bytes


def test_exactness_by_its_names(profile_of):
    for rung in Exactness:
        for written in (rung, rung.value):
            assert plan(profile_of("tied"), "100%", exactness=written).exactness is rung
    with pytest.raises(PlanError, match="'bitwise', 'exact', 'unbiased'"):
        plan(profile_of("tied"), "100%", exactness="roughly")


def test_unknown_methods_are_not_allowed(profile_of):
    with pytest.raises(MethodError, match="recompute"):
        plan(profile_of("tied"), "100%", allow=["recompte"])


def test_clipping_by_global_norm_is_refused_where_it_cannot_be_done(profile_of):
    made = plan(profile_of("non_contiguous"), "min", exactness="bitwise", clip_grad_norm=1.0)
    assert made.clip_grad_norm == 1.0
    assert "update_in_backward" not in {c.method for c in made.choices}
    assert "norm" in made.refusals["update_in_backward"]


def test_batch_norm_refuses_micro_batches(profile_of):
    made = plan(profile_of("conv_batchnorm"), "min")
    assert "micro_batches" not in {c.method for c in made.choices}
    assert "batch norm" in made.refusals["micro_batches"]


def test_dropout_is_told_where_masks_differ(profile_of):
    profile = profile_of("attention")
    made = hand_made(profile, variant=micro_batched(profile, 2))
    notes = {c.method: c.note for c in made.choices}
    assert "dropout masks differ" in notes["micro_batches"]


def test_plans_say_whether_they_need_step(profile_of, leanest):
    assert "micro-batches" in leanest("lstm").needs_step
    reasons = {
        "update_in_backward": "updates during backward",
        "micro_batches": "micro-batches",
        "offload_gradients": "gradients in files",
    }
    for name in ("mlp", "lstm", "non_contiguous"):
        for rung in ("bitwise", "exact"):
            made = leanest(name, rung)
            chosen = {c.method for c in made.choices}
            for method, reason in reasons.items():
                assert (method in chosen) == (reason in made.needs_step)


def test_a_choice_tells_what_it_frees(leanest):
    made = leanest("mlp", "bitwise")
    for choice in made.choices:
        assert choice.note
        assert choice.freed.keys() <= {c.value for c in Column}
        assert sum(choice.freed.values()) > 0, choice
    blocks = [c for c in made.choices if c.path]
    assert len({c.path for c in blocks}) == len(blocks)


def test_a_plan_prints_what_is_done_where(leanest):
    made = leanest("mlp", "bitwise")
    shown = str(made)
    for choice in made.choices:
        assert choice.method in shown
    assert "KiB" in shown


# -- JSON ----------------------------------------------------------------------------------------------


def test_a_plan_tells_how_far_from_the_best_it_may_be(profile_of, leanest):
    profile, least = profile_of("llama"), leanest("llama").peak_bytes
    made = plan(profile, (least + profile.peak_bytes) // 2)
    assert 0 < made.bound_seconds <= made.seconds
    assert made.gap is not None
    assert made.gap < 0.05
    assert f"at most {made.gap:.1%} above the best possible" in " ".join(str(made).split())
    assert leanest("llama").gap is None  # seconds are not what was asked for
    assert "above the best possible" not in str(leanest("llama"))


@pytest.mark.parametrize("name", ["mlp", "lstm"])
@pytest.mark.parametrize("exactness", ["bitwise", "exact"])
def test_json_round_trip(leanest, tmp_path, name, exactness):
    made, path = leanest(name, exactness), tmp_path / "plan.json"
    made.save(path)
    loaded = Plan.load(path)
    assert loaded == made
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_text() == path.read_text()


def test_a_file_that_is_no_plan(leanest, tmp_path):
    path = tmp_path / "plan.json"
    leanest("mlp", "bitwise").save(path)
    whole = path.read_text()
    data = json.loads(whole)
    broken = [
        "",
        "[]",
        "null",
        "{}",
        whole[: len(whole) // 2],
        json.dumps(data | {"format": 99}),
        json.dumps(data | {"exactness": "roughly"}),
        json.dumps(data | {"peak_bytes": "much"}),
        json.dumps(data | {"choices": [{"method": "recompute"}]}),
        json.dumps({k: v for k, v in data.items() if k != "fingerprint"}),
    ]
    for text in broken:
        path.write_text(text)
        with pytest.raises(PlanError, match="not a plan"):
            Plan.load(path)
    with pytest.raises(PlanError, match="not a plan"):
        Plan.load(tmp_path / "absent.json")


def test_forbidden_methods_are_left_out(profile_of, tmp_path):
    profile = profile_of("llama")
    free = plan(profile, "min")
    names = {choice.method for choice in free.choices}
    assert names
    for name in names:
        made = plan(profile, "min", forbid=[name])
        assert name not in {choice.method for choice in made.choices}
        assert made.refusals[name] == "it was forbidden (forbid)"
        assert made.peak_bytes >= free.peak_bytes
        made.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json").forbid == (name,)
    with pytest.raises(MethodError, match="recompute"):
        plan(profile, "min", forbid=["recompte"])
