"""Codes in the programme: which ways are offered, the bound on the error, and what plans write down."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.every_method.coded_blocks import records_of, sensitive_profile, stores
from tests.planning.test_solve import BLOCKS, DRAWN, programme_of

from slimgrad.errors import BudgetError, PlanError
from slimgrad.measuring.profile import Profile
from slimgrad.method import Block, Refusal, Scope
from slimgrad.planning import plan as planning
from slimgrad.planning.coded import coded_ways, undominated
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Allowed
from slimgrad.planning.plan import Plan, plan
from slimgrad.planning.solve import Programme
from slimgrad.planning.workbench import Workbench
from slimgrad.types import Exactness

PRICES = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=12)


@settings(DRAWN, max_examples=200)
@given(prices=PRICES)
def test_undominated_are_those_that_none_is_better_than(prices: list[tuple[int, int, int]]) -> None:
    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return a != b and all(x <= y for x, y in zip(a, b, strict=True))

    found = undominated(prices, lambda p: p)
    assert found == sorted({p for p in prices if not any(beats(other, p) for other in prices)})


@pytest.mark.parametrize("sample", ["mlp", "attention"])
def test_no_storage_is_coded_twice_and_each_way_ends_with_a_schedule(sample: str) -> None:
    twos = 0
    for path, record in records_of(sensitive_profile(sample)).items():
        ways = coded_ways(path, record, list(stores().values())) if record.coding else []
        assert ways or not record.coding
        for way in ways:
            numbers = [c.number for c in way.record.coded]
            assert numbers
            assert len(numbers) == len(set(numbers))
            given_ = [n for method in way.methods[:-1] for n in method.storages]
            assert len(given_) == len(set(given_))
            assert set(numbers) <= set(given_)
            assert not set(numbers) & set(way.record.kept)
            whole = sum(record.coding[m.setting].squared_error for m in way.methods[:-1])  # pyright: ignore[reportAttributeAccessIssue]
            assert 0 < way.record.squared_error <= whole * (1 + 1e-9)  # of what is kept as a code
            twos += len(way.methods) == 3
    assert twos or sample != "mlp"


@pytest.mark.parametrize("sample", ["mlp", "attention"])
def test_ways_that_keep_to_the_error_are_among_those_offered(sample: str) -> None:
    for path, record in records_of(sensitive_profile(sample)).items():
        if not record.coding:
            continue
        # the least error with which all that one store suits can be coded
        least = min(cost.squared_error for cost in record.coding.values()) ** 0.5
        ways = coded_ways(path, record, list(stores().values()), 1.01 * least)
        assert any(way.record.squared_error**0.5 <= 1.01 * least for way in ways)


def test_where_nothing_may_be_run_again_nothing_is() -> None:
    for path, record in records_of(sensitive_profile("mlp")).items():
        if not record.coding:
            continue
        assert record.graph is not None
        ways = coded_ways(path, record, list(stores().values()), may_run_again=False)
        assert ways
        for way in ways:
            held = {*way.record.kept, *way.record.moved, *(c.number for c in way.record.coded)}
            assert held >= set(record.graph.saved)
        free = coded_ways(path, record, list(stores().values()))
        assert len(free) > len(ways)


def with_errors(blocks: Any, errors: list[float], allowed: float) -> Programme:
    """A programme in which each option brings an error, one after the other from ``errors``."""
    made = programme_of(blocks, half=True, stretches=3)
    options = [
        replace(o, record=replace(o.record, squared_error=errors[i % len(errors)] ** 2))
        for i, o in enumerate(made.menu.options)
    ]
    return Programme(made.scheme, Menu(made.layout, options), allowed)


def every_choice(programme: Programme) -> list[tuple[int, float, float, float]]:
    """(peak, peak with shared border tensors counted for each block, added seconds, squared error) of every choice of
    at most one option a block."""
    options = programme.menu.options
    paths = sorted({o.path for o in options})
    by_path = [[None, *(i for i, o in enumerate(options) if o.path == p)] for p in paths]
    found: list[tuple[int, float, float, float]] = []
    slots = range(programme.layout.num_slots)
    for picked in itertools.product(*by_path):
        chosen = np.zeros(len(options))
        chosen[[i for i in picked if i is not None]] = 1
        peak = int(programme.replay(chosen)[0].max())
        alone = float((programme.fixed + chosen @ programme.menu.at(slots)).max())
        error = float(chosen @ programme.menu.squared_errors)
        found.append((peak, alone, float(chosen @ programme.added_s), error))
    return found


def error_of(options: Any) -> float:
    """The error that chosen options bring together."""
    return sum(o.record.squared_error for o in options) ** 0.5


SECONDS = st.lists(st.sampled_from([0.0, 0.01, 0.02, 0.05]), min_size=1, max_size=8)


@DRAWN
@given(blocks=BLOCKS.map(lambda blocks: blocks[:3]), spent=SECONDS, share=st.floats(0.0, 1.0))
def test_codes_take_no_more_seconds_than_they_may(
    blocks: Any, spent: list[float], share: float
) -> None:
    made = programme_of(blocks, half=True, stretches=3)
    options = [replace(o, coding_s=spent[i % len(spent)]) for i, o in enumerate(made.menu.options)]
    programme = Programme(made.scheme, Menu(made.layout, options), coding_s=0.03)
    free = Programme(made.scheme, Menu(made.layout, options))
    leanest, leanest_of_all = programme.least_peak(), free.least_peak()
    assert sum(o.coding_s for o in leanest.options) <= 0.03 + 1e-9
    assert leanest.peak_bytes >= leanest_of_all.peak_bytes
    plain = int(programme.fixed.max())
    budget = int(leanest.peak_bytes + share * (plain - leanest.peak_bytes))
    solution = programme.least_seconds(budget)
    assert solution is not None or share < 1
    if solution is not None:
        assert sum(o.coding_s for o in solution.options) <= 0.03 + 1e-9
        assert solution.peak_bytes <= budget


ERRORS = st.lists(st.sampled_from([0.0, 0.004, 0.01, 0.02, 0.04]), min_size=1, max_size=8)


@DRAWN
@given(
    blocks=BLOCKS.map(lambda blocks: blocks[:3]),
    errors=ERRORS,
    allowed=st.sampled_from([0.001, 0.012, 0.03, 0.1]),
    share=st.floats(0.0, 1.0),
)
def test_the_fastest_within_the_error_is_what_exhaustive_search_finds(
    blocks: Any, errors: list[float], allowed: float, share: float
) -> None:
    programme = with_errors(blocks, errors, allowed)
    choices = [c for c in every_choice(programme) if c[3] <= allowed**2 * (1 + 1e-9)]
    lowest, plain = min(c[0] for c in choices), choices[0][0]
    budget = int(lowest + share * (plain - lowest))
    fitting = [c[2] for c in choices if c[0] <= budget]
    surely = [c[2] for c in choices if c[1] <= budget]  # by the programme's own reckoning
    solution = programme.least_seconds(budget)
    assert solution is not None or not surely
    if solution is not None:
        assert solution.peak_bytes <= budget
        assert error_of(solution.options) <= allowed * (1 + 1e-6)
        added = solution.seconds - programme.scheme.seconds
        assert added >= min(fitting) - 1e-6
        gap = 1.1e-3 * programme.scheme.seconds + 1e-6  # the solver stops within a thousandth
        assert added <= min(surely, default=np.inf) + gap
    leanest = programme.least_peak()
    assert error_of(leanest.options) <= allowed * (1 + 1e-6)
    assert leanest.peak_bytes >= lowest


@functools.cache
def timed_profile() -> Profile:
    """The profile of a small transformer with codes that take no time and operations that take some."""
    profile = sensitive_profile("attention")
    for trace in profile.variants.values():
        trace.op_seconds[:] = 1e-3
    coding = {
        path: {s: replace(cost, encode_s=1e-9, decode_s=1e-9) for s, cost in costs.items()}
        for path, costs in profile.coding.items()
    }
    return replace(profile, coding=coding)


def is_coded(made: Plan) -> bool:
    """Whether any choice keeps codes."""
    return any(c.method in stores() for c in made.choices)


def test_more_allowed_error_costs_no_more_seconds_and_no_more_bytes() -> None:
    profile, allowed = timed_profile(), (1e-5, 1e-3, 0.01, 0.05, 0.2)
    made = [plan(profile, "min", exactness="approximate", error=e) for e in allowed]
    budget = max(int(0.6 * profile.peak_bytes), *(p.peak_bytes for p in made))
    at_budget = [plan(profile, budget, exactness="approximate", error=e) for e in allowed]
    for error, leanest, fastest in zip(allowed, made, at_budget, strict=True):
        assert leanest.predicted_error <= error
        assert fastest.predicted_error <= error
    for less, more in itertools.pairwise(made):
        assert more.peak_bytes <= less.peak_bytes
    for less, more in itertools.pairwise(at_budget):
        assert more.seconds <= less.seconds * (1 + 2e-3)  # the solver stops within a thousandth
    assert any(map(is_coded, at_budget))
    assert not is_coded(made[0])


@pytest.mark.parametrize("rung", ["bitwise", "exact"])
def test_exact_rungs_use_no_code_and_take_no_error(rung: str) -> None:
    profile = timed_profile()
    exact = plan(profile, "min", exactness=rung)
    assert not is_coded(exact)
    assert exact.error is None
    assert exact.predicted_error == 0.0
    with pytest.raises(PlanError, match="allows none"):
        plan(profile, "min", exactness=rung, error=0.05)


@pytest.mark.parametrize("error", [0.0, -0.1, float("nan"), float("inf"), "5%"])
def test_an_error_that_is_none_is_refused(error: Any) -> None:
    with pytest.raises(PlanError, match="positive number"):
        plan(timed_profile(), "min", exactness="approximate", error=error)


def test_unbiased_plans_have_unbiased_codes_alone() -> None:
    made = plan(timed_profile(), "min", exactness="unbiased", error=0.5)
    used = {c.method for c in made.choices} & set(stores())
    assert {stores()[name].exactness for name in used} <= {Exactness.UNBIASED}


@pytest.mark.parametrize("name", stores())
def test_a_profile_without_sensitivity_refuses_codes(name: str) -> None:
    profile = replace(timed_profile(), coding={})
    record = next(r for r in records_of(profile).values() if r.graph is not None)
    store = next(iter(stores()[name].grades(Block("", Scope.BLOCK, record))), None)
    if store is None:
        pytest.skip("it suits nothing that the sample saves")
    offer = store.offer(Block("", Scope.BLOCK, record))
    assert isinstance(offer, Refusal)
    assert "sensitivity=True" in offer.reason
    made = plan(profile, "min", exactness="approximate")
    assert not is_coded(made)
    assert "sensitivity=True" in made.refusals[name]


def test_profile_and_plan_survive_being_saved(tmp_path: Path) -> None:
    profile = timed_profile()
    profile.save(tmp_path / "profile.json")
    read = Profile.load(tmp_path / "profile.json")
    assert read.coding == profile.coding
    assert read.coding
    made = plan(profile, "60%", exactness="approximate", error=0.2)
    assert is_coded(made)
    assert plan(read, "60%", exactness="approximate", error=0.2).choices == made.choices
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.choices == made.choices
    assert (again.error, again.predicted_error) == (made.error, made.predicted_error)


def test_a_budget_that_exact_rungs_miss_is_told_with_what_codes_reach() -> None:
    profile = timed_profile()
    lowest = plan(profile, "min", exactness="exact").peak_bytes
    coded = plan(profile, "min", exactness="approximate").peak_bytes
    assert coded <= lowest
    with pytest.raises(BudgetError) as told:
        plan(profile, coded - 1, exactness="approximate")
    assert told.value.smallest_bytes == coded
    with pytest.raises(BudgetError) as told:
        plan(profile, coded - 1, exactness="exact")
    assert told.value.smallest_bytes == lowest


def test_looser_rungs_are_asked_with_the_error_that_they_would_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[Exactness, float | None] = {}

    class Asked(Workbench):
        def __init__(self, profile: Profile, allowed: Allowed) -> None:
            asked[allowed.exactness] = allowed.error
            super().__init__(profile, allowed)

    monkeypatch.setattr(planning, "Workbench", Asked)
    with pytest.raises(BudgetError):
        plan(timed_profile(), 1, exactness="exact")
    assert asked == {
        Exactness.EXACT: None,
        Exactness.UNBIASED: planning.DEFAULT_ERROR,
        Exactness.APPROXIMATE: planning.DEFAULT_ERROR,
    }


@pytest.mark.parametrize("sample", ["mlp", "attention"])
def test_nothing_is_run_again_on_codes_that_only_backward_may_read(sample: str) -> None:
    """A number on which the derivative is the level is not near to the tensor: no operation may start from it."""
    num_again = 0
    for path, record in records_of(sensitive_profile(sample)).items():
        if record.graph is None or not record.coding:
            continue
        # what a schedule runs again follows from seconds: the same for each, they are not the machine's mood
        even = tuple((1e-4, reads, writes) for _, reads, writes in record.graph.operations)
        record = replace(record, graph=replace(record.graph, operations=even))
        for way in coded_ways(path, record, list(stores().values())):
            graph = way.record.graph
            assert graph is not None
            codes = {c.number: c.is_near for c in way.record.coded}
            there = {*way.record.kept, *way.record.moved, *codes}
            again = graph.recipe([s for s, saved in enumerate(graph.is_saved) if saved], there)
            read = {s for o in again for s in graph.operations[o][1] if s in codes}
            assert all(codes[s] for s in read), (path, way.methods)
            num_again += bool(again)
    assert num_again or sample == "mlp"
