"""Seconds of real passes: what they scale, when they are run, and that nothing is left of them."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.sample_models import SAMPLES, adamw

from slimgrad import measure
from slimgrad.host import Host
from slimgrad.measuring.profile import Profile
from slimgrad.planning import real_passes
from slimgrad.planning.offers import Scheme
from slimgrad.planning.real_passes import time_passes

NO_LIMIT = {"limit_bytes": None, "limit_s": 1e6}


@pytest.fixture
def traced(monkeypatch):
    """A profile with unscaled traces, and the host they were made on; passes of any length are timed."""
    model, loss_fn, batch = SAMPLES["gpt2"].make()
    optimizer = adamw(model)
    profile = measure(model, optimizer, loss_fn, batch, limit_s=0.0)
    assert not any(trace.is_timed for trace in profile.variants.values())
    monkeypatch.setattr(real_passes, "_LEAST_S", 0.0)
    return profile, Host(model, optimizer, loss_fn), batch


def _seconds(profile: Profile):
    return {key: float(trace.op_seconds.sum()) for key, trace in profile.variants.items()}


def _clocked(monkeypatch, factors):
    """Real passes that take ``factors`` times what was planned: the first of a list in the first round, and so on."""

    def run(way, host, batch):
        names = tuple(name for name, _ in way.methods)
        taken = factors.get(names, [1.0])
        way.taken.append(way.planned_s * taken[min(len(way.taken), len(taken) - 1)])

    monkeypatch.setattr(real_passes._Way, "run", run)


def test_operations_are_scaled_to_real_passes(traced, monkeypatch):
    profile, host, batch = traced
    before = _seconds(profile)
    unscaled = {key: trace.op_seconds for key, trace in profile.variants.items()}
    factors = {
        (): [9.0, 3.0, 2.0],
        ("micro_batches",): [1.0, 5.0],
        ("chunked_cross_entropy",): [4.0],
        ("memory_sharing_norm",): [3.5],
    }
    _clocked(monkeypatch, factors)
    time_passes(host, batch, profile.variants, **NO_LIMIT)
    after = _seconds(profile)
    expected = {(): 2.0, ("micro_batches",): 5.0, ("chunked_cross_entropy",): 4.0}
    expected[("memory_sharing_norm",)] = 3.5
    assert any(len(key) == 2 for key in before)
    for key, trace in profile.variants.items():
        assert trace.is_timed
        if len(key) < 2:
            names = tuple(name for name, _ in key)
            assert after[key] == pytest.approx(expected[names] * before[key])
            continue
        # what the chunked loss adds is added outside of blocks, and micro-batches make both slower
        loss = next((setting,) for setting in key if setting[0] == "chunked_cross_entropy")
        is_inside, loss_is_inside = (profile.variants[k].op_call >= 0 for k in (key, loss))
        both, alone = unscaled[key], unscaled[loss]
        outside = (4.0 * alone.sum() - 2.0 * alone[loss_is_inside].sum()) / alone[
            ~loss_is_inside
        ].sum()
        expected_s = both[is_inside].sum() * 2.0 + both[~is_inside].sum() * outside
        assert after[key] == pytest.approx(expected_s * 5.0 / 2.0)


def test_blocks_take_the_same_under_every_loss(traced, monkeypatch):
    profile, host, batch = traced
    _clocked(monkeypatch, {(): [2.0], ("chunked_cross_entropy",): [4.0]})
    time_passes(host, batch, profile.variants, **NO_LIMIT)
    plain = profile.variants[()]
    for key, trace in profile.variants.items():
        if [name for name, _ in key] == ["chunked_cross_entropy"]:
            inside = trace.op_seconds[trace.op_call >= 0]
            assert np.array_equal(inside, plain.op_seconds[plain.op_call >= 0])


def test_no_method_saves_more_than_it_does_away_with(traced, monkeypatch):
    profile, host, batch = traced
    plain, before = profile.variants[()], _seconds(profile)
    outside = float(plain.op_seconds[plain.op_call < 0].sum())  # the head and the loss
    assert outside < 0.9 * before[()]
    _clocked(monkeypatch, {("chunked_cross_entropy",): [1e-3]})
    time_passes(host, batch, profile.variants, **NO_LIMIT)
    after = _seconds(profile)
    chunked = [key for key in after if [name for name, _ in key] == ["chunked_cross_entropy"]]
    assert chunked
    assert all(before[()] - outside <= after[key] <= before[()] for key in chunked)


def test_what_is_not_run_is_as_far_off_as_plain(traced, monkeypatch):
    profile, host, batch = traced
    before = _seconds(profile)
    _clocked(monkeypatch, {(): [3.0]})
    plain_only = 1.01 * real_passes._ROUNDS * before[()]
    time_passes(host, batch, profile.variants, limit_bytes=None, limit_s=plain_only)
    after = _seconds(profile)
    assert all(after[key] == pytest.approx(3.0 * before[key]) for key in before)
    assert [key for key in before if profile.variants[key].is_timed] == [()]


def test_nothing_is_run_where_the_plain_passes_do_not_fit(traced):
    profile, host, batch = traced
    before = _seconds(profile)
    peak = profile.variants[()].timeline().peak_bytes
    time_passes(host, batch, profile.variants, limit_bytes=peak - 1, limit_s=1e6)
    time_passes(host, batch, profile.variants, limit_bytes=None, limit_s=0.0)
    assert _seconds(profile) == before


def test_nothing_is_left_of_real_passes(traced):
    profile, host, batch = traced
    before, values = _seconds(profile), {n: t.clone() for n, t in host.model.state_dict().items()}
    random = torch.get_rng_state()
    time_passes(host, batch, profile.variants, **NO_LIMIT)
    assert _seconds(profile) != before
    assert profile.variants[()].is_timed
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, values[n]) for n, t in host.model.state_dict().items())
    assert all(p.grad is None for p in host.model.parameters())


def test_a_loss_that_fails_for_real_leaves_the_planned_seconds(traced):
    profile, host, batch = traced
    before = _seconds(profile)

    def failing(model, batch):
        raise ValueError("no")

    host.loss_fn = failing
    time_passes(host, batch, profile.variants, **NO_LIMIT)
    assert _seconds(profile) == before


def test_savings_count_only_where_they_were_seen(traced):
    profile, _, _ = traced
    trace = profile.variants[()]
    passes = float(trace.op_seconds.sum())
    record = dataclasses.replace(_record(profile), update_s=0.0, extra_s=0.0)
    for is_timed, plain_s, expected in [
        (False, 2 * passes, 2 * passes),
        (True, 2 * passes, passes + 0.04 * passes),
        (True, 1.001 * passes, 1.001 * passes),
        (True, 0.5 * passes, passes),
    ]:
        scheme = Scheme((), (), record, dataclasses.replace(trace, is_timed=is_timed), plain_s)
        assert scheme.seconds == pytest.approx(expected)


def _record(profile: Profile):
    from slimgrad.planning.settings import model_record

    return model_record(profile, 1, None)
