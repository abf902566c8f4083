"""Layouts are sound, never below the live bytes, and the programme finds the smallest arena there is."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimgrad.arena import (
    RULES,
    Lifetimes,
    by_programme,
    by_stretches,
    first_fit,
    greedy_by_breadth,
    greedy_by_size,
    layouts,
    overlapping,
    size_of,
)


def lifetimes(rows):
    nbytes, birth, length = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Lifetimes(nbytes, birth, birth + length)


def rows(most):
    row = st.tuples(st.integers(0, 40), st.integers(0, 12), st.integers(1, 6))
    return st.lists(row, min_size=1, max_size=most)


def smallest(some):
    """By trying every order: each on top of what lies below it and is live together with it."""
    best = some.total_bytes
    for order in itertools.permutations(range(len(some))):
        ends: dict[int, int] = {}
        for i in order:
            under = [ends[j] for j in ends if some.meets(i)[j] and some.nbytes[j]]
            ends[i] = max(under, default=0) + int(some.nbytes[i])
        best = min(best, max(ends.values()))
    return best


@given(rows(30))
@settings(max_examples=60, deadline=None)
def test_no_rule_lays_two_live_tensors_on_one_another(some):
    found = lifetimes(some)
    for arena in layouts(found, borders=[3, 7], limit_s=1.0):
        assert overlapping(found, arena.offsets) == []
        assert found.bound <= arena.nbytes <= found.total_bytes


def test_an_overlap_is_noticed():
    some = lifetimes([(10, 0, 4), (10, 3, 2), (10, 4, 2)])
    assert overlapping(some, np.array([0, 9, 0])) == [(0, 1), (1, 2)]
    assert overlapping(some, np.array([0, 10, 0])) == []


@given(rows(6))
@settings(max_examples=40, deadline=None)
def test_the_programme_finds_the_smallest_arena(some):
    found = lifetimes(some)
    assert size_of(found, by_programme(found)) == smallest(found)


def test_greedy_rules_beat_an_allocator_that_cannot_look_ahead():
    # what is small and lives long comes first, and splits the memory for what is large
    some = lifetimes([(100, 0, 3), (10, 1, 9), (80, 2, 2), (120, 5, 3), (30, 6, 2)])
    assert some.bound == 190
    assert size_of(some, first_fit(some)) > 190
    assert size_of(some, greedy_by_size(some)) == 190
    assert size_of(some, greedy_by_breadth(some)) == 190


def test_the_integer_programme_passes_the_greedy_rules():
    rng = np.random.default_rng(3)
    better = 0
    for _ in range(40):
        sizes, births = rng.integers(1, 20, 9), rng.integers(0, 8, 9)
        some = Lifetimes(sizes, births, births + rng.integers(1, 6, 9))
        greedy = min(size_of(some, greedy_by_size(some)), size_of(some, greedy_by_breadth(some)))
        best = size_of(some, by_programme(some))
        assert best <= greedy
        better += best < greedy
    assert better > 0


def test_equal_stretches_are_laid_out_alike():
    one = [(64, 0, 2), (32, 1, 2), (64, 2, 2), (16, 0, 4)]
    some = lifetimes([(n, b + 4 * i, d) for i in range(5) for n, b, d in one])
    offsets = by_stretches(some, borders=[0, 4, 8, 12, 16])
    parts = offsets.reshape(5, 4)
    assert (parts == parts[0]).all()
    assert size_of(some, offsets) == some.bound


def test_too_many_pairs_are_refused_with_the_way_out():
    some = lifetimes([(8, 0, 2)] * 60)
    with pytest.raises(ValueError, match="use by_stretches"):
        by_programme(some)


@pytest.mark.parametrize(("birth", "death"), [([0], [0]), ([2], [1])])
def test_lifetimes_that_end_before_they_begin_are_refused(birth, death):
    with pytest.raises(ValueError, match="deaths after births"):
        Lifetimes(np.array([1]), np.array(birth), np.array(death))


def test_sizes_are_aligned():
    some = lifetimes([(1, 0, 1), (64, 0, 1), (65, 0, 1)]).aligned()
    assert some.nbytes.tolist() == [64, 64, 128]
    assert set(RULES) == {a.rule for a in layouts(some)}
