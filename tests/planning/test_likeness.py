"""Steps whose blocks do the same are offered the same, and share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.planning.test_programme import profile_of

from slimgrad.measuring.profile import Profile
from slimgrad.measuring.trace import Trace
from slimgrad.method import Restore
from slimgrad.planning.offers import Allowed, Option, Scheme, options, schemes
from slimgrad.planning.settings import layout_of
from slimgrad.planning.simulate import Layout

ALLOWED = Allowed()


def _paced(sample: str) -> Profile:
    """The profile of a sample model in which an operation of a block takes the same in every traced variant."""
    profile = profile_of(sample)
    paced = dict[object, Trace]()
    for key, trace in profile.variants.items():
        seconds = np.array([1e-5 * (3 + len(names)) for names in trace.reads])
        paced[key] = replace(trace, op_seconds=seconds)
    return replace(profile, variants=paced)


def _offered(profile: Profile, scheme: Scheme) -> tuple[bytes, list[Option]]:
    layout = layout_of(profile, scheme.trace)
    return layout.what_blocks_do.digest, options(profile, scheme, layout, ALLOWED)


@pytest.mark.parametrize("sample", ["gpt2", "attention", "tied", "conv_batchnorm", "shared_twice"])
def test_what_is_alike_is_offered_the_same(sample: str) -> None:
    profile, found = _paced(sample), dict[object, list[Option]]()
    num_shared = 0
    for scheme in schemes(profile, ALLOWED):
        if len(scheme.methods) > len(scheme.variant):
            continue
        alike, offered = _offered(profile, scheme)
        key = alike, scheme.repeats
        num_shared += key in found
        assert found.setdefault(key, offered) == offered
    if any("chunked_cross_entropy" in dict(variant) for variant in profile.variants):
        assert num_shared


def _with(trace: Trace, field: str, index: int, value: float) -> Trace:
    values = getattr(trace, field).copy()
    values[index] += value
    return replace(trace, **{field: values})


CHANGES: dict[str, Callable[[Trace, int, int], Trace]] = {
    "seconds": lambda trace, tick, _: _with(trace, "op_seconds", tick, 1e-6),
    "bytes": lambda trace, _, storage: _with(trace, "nbytes", storage, 64),
    "death": lambda trace, _, storage: _with(trace, "death", storage, trace.num_ticks),
    "column": lambda trace, _, storage: _with(trace, "column", storage, 1),
    "reads": lambda trace, tick, _: replace(
        trace, reads=[() if i == tick else r for i, r in enumerate(trace.reads)]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_within_a_block_is_seen(name: str) -> None:
    profile = _paced("gpt2")
    trace = profile.variants[()]
    inside = np.flatnonzero((trace.op_call >= 0) & ~trace.op_backward)
    tick = next(t for t in inside.tolist() if trace.reads[t] and trace.writes[t])
    changed = CHANGES[name](trace, tick, trace.writes[tick][0])
    same, other = (layout_of(profile, t).what_blocks_do.digest for t in (trace, changed))
    assert layout_of(profile, replace(trace)).what_blocks_do.digest == same
    assert other != same


@pytest.mark.parametrize("sample", ["gpt2", "llama"])
def test_a_layout_that_learns_knows_what_it_would_find_itself(sample: str) -> None:
    profile, first, num_learned = _paced(sample), dict[bytes, Layout](), 0
    for scheme in schemes(profile, ALLOWED):
        layout, learning = (layout_of(profile, scheme.trace) for _ in range(2))
        teacher = first.setdefault(layout.what_blocks_do.digest, layout)
        if teacher is layout or len(scheme.methods) > len(scheme.variant):
            continue
        learning.learns_from(teacher)
        num_learned += 1
        for option in options(profile, scheme, layout, ALLOWED):
            block, same = layout.block(option.where), learning.block(option.where)
            assert (block.groups, block.saved) == (same.groups, same.saved)
            if option.record.restore is not Restore.OPERATIONS:
                continue
            for calls in block.groups:
                assert learning.operations(calls) == layout.operations(calls)
                one, other = (x.replayed(calls, option.record) for x in (layout, learning))
                assert np.array_equal(one.again, other.again)
                assert (one.bursts, one.held, one.seconds) == (
                    other.bursts,
                    other.held,
                    other.seconds,
                )
            assert layout.held(option.where, option.record) == learning.held(
                option.where, option.record
            )
    assert num_learned
