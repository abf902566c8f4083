"""Blocks that do the same at another pace share replays: shared ones equal those that are made alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.planning.test_programme import profile_of
from tests.single_method_plans import scheme_of

from slimgrad.method import Restore
from slimgrad.planning import module_replay, replay
from slimgrad.planning.offers import Allowed, Option, options
from slimgrad.planning.replay import Replayed
from slimgrad.planning.settings import layout_of

CACHES = (replay._tape, module_replay._repeated)


def _all_replayed(sample: str, pace: float) -> list[tuple[Option, Replayed]]:
    """The replays of everything offered for a sample's blocks whose operations take ``pace`` times as long."""
    profile = profile_of(sample)
    plain = scheme_of(profile)
    trace = replace(plain.trace, op_seconds=plain.trace.op_seconds * pace)
    layout = layout_of(profile, trace)
    found: list[tuple[Option, Replayed]] = []
    for option in options(profile, replace(plain, trace=trace), layout, Allowed()):
        if option.record.restore is Restore.OPERATIONS:
            groups = layout.block(option.where).groups
            found += [(option, layout.replayed(group, option.record)) for group in groups]
    return found


@pytest.mark.parametrize("sample", ["attention", "shared_twice"])
def test_shared_replays_equal_those_made_alone(sample: str) -> None:
    for cache in CACHES:
        cache.cache_clear()
    alone = _all_replayed(sample, 1.25)
    for cache in CACHES:
        cache.cache_clear()
    _all_replayed(sample, 1.0)
    num_hits = sum(cache.cache_info().hits for cache in CACHES)
    shared = _all_replayed(sample, 1.25)
    assert sum(cache.cache_info().hits for cache in CACHES) > num_hits
    assert alone
    assert len(alone) == len(shared)
    for (option, one), (same, other) in zip(alone, shared, strict=True):
        assert (option.where, option.added_s) == (same.where, same.added_s)
        assert np.array_equal(one.again, other.again)
        assert (one.bursts, one.held, one.seconds) == (other.bursts, other.held, other.seconds)
        assert (one.num_reads, one.read_bytes) == (other.num_reads, other.read_bytes)
