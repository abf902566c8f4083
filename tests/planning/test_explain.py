"""``explain``: what it says of a plan is what planning again at other budgets shows."""

from __future__ import annotations

import json

import pytest
from tests.planning.test_programme import profile_of

from slimgrad import plan
from slimgrad.errors import BudgetError
from slimgrad.planning.explain import explain

SAMPLE = "attention"


@pytest.mark.parametrize("budget", ["60%", "80%", "100%", "min"])
def test_more_and_less_budget_are_what_plan_answers(budget):
    profile = profile_of(SAMPLE)
    try:
        made = plan(profile, budget)
    except BudgetError as error:
        made = plan(profile, budget := error.smallest_bytes)
    why = explain(profile, budget)
    assert (why.peak_bytes, why.seconds) == (made.peak_bytes, made.seconds)
    more = plan(profile, int(1.1 * made.budget_bytes))
    assert (why.more.peak_bytes, why.more.seconds) == (more.peak_bytes, more.seconds)
    assert why.smallest_bytes == plan(profile, "min").peak_bytes
    if why.less is None:
        with pytest.raises(BudgetError):
            plan(profile, int(0.9 * made.budget_bytes))
    else:
        assert why.less.seconds >= why.seconds * (1 - 1e-3)
    assert why.seconds_per_mib >= 0


def test_the_binding_instants_are_the_highest_of_the_timeline():
    profile = profile_of(SAMPLE)
    made = plan(profile, "min")
    why = explain(profile, "min")
    assert why.binding[0].live_bytes == made.peak_bytes == sum(why.binding[0].columns.values())
    assert all(i.live_bytes >= 0.995 * made.peak_bytes for i in why.binding)
    assert made.timeline is not None
    assert why.binding[0].columns == {c.value: v for c, v in made.timeline.at_peak().items()}


def test_a_plan_as_fast_as_plain_training_has_no_price():
    why = explain(profile_of(SAMPLE), "100%")
    assert why.seconds_per_mib == 0
    assert "would not make the step faster" in str(why)


def test_it_prints_and_is_json():
    why = explain(profile_of(SAMPLE), "min")
    assert json.loads(json.dumps(why.to_json()))["peak_bytes"] == why.peak_bytes
    text = str(why)
    assert "What binds" in text
    assert "10 % more budget" in text
