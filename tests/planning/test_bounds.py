"""What is known of a step's peak before anything is offered is never above what a choice of options comes to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.test_programme import profile_of

from slimgrad.planning.calls import call_seconds
from slimgrad.planning.offers import Allowed, schemes
from slimgrad.planning.operations import made_inside
from slimgrad.planning.workbench import Workbench

SAMPLES = ("attention", "shared_twice")


@pytest.mark.parametrize("sample", SAMPLES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_choice_is_below_the_bound(sample: str, data: st.DataObject) -> None:
    profile, allowed = profile_of(sample), Allowed()
    bench, found = Workbench(profile, allowed), schemes(profile, allowed)
    scheme = data.draw(st.sampled_from(found))
    programme = bench.programme(scheme)
    chosen, taken = np.zeros(len(programme.bundles)), set[str]()
    for index in data.draw(st.permutations(range(len(chosen)))):
        if not programme.menu.covers[index] & taken and data.draw(st.booleans()):
            chosen[index] = 1
            taken |= programme.menu.covers[index]
    live, _ = programme.replay(chosen)
    assert bench.peak_bound(scheme) <= live.max()
    assert bench.peak_bound(scheme) > profile.weight_bytes


@pytest.mark.parametrize("sample", SAMPLES)
def test_indices_of_a_layout_find_what_a_search_of_the_trace_finds(sample: str) -> None:
    profile = profile_of(sample)
    for scheme in schemes(profile, Allowed()):
        layout, trace = Workbench(profile, Allowed())._layout(scheme), scheme.trace
        for index, call in enumerate(trace.calls):
            inside = (trace.birth > call.forward_from) & (trace.birth <= call.forward_to)
            expected = np.flatnonzero(inside).tolist()
            assert layout.born(call.forward_from, call.forward_to).tolist() == expected
            assert sorted(made_inside(trace, [index])) == expected
            for backward in (False, True):
                seconds = call_seconds(trace, (index,), backward=backward)
                assert layout.seconds((index,), backward=backward) == seconds
