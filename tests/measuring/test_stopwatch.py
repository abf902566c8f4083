"""Seconds of work: runs in turns, and what takes the cache."""

import itertools

import pytest
import torch

from slimgrad.measuring import stopwatch
from slimgrad.measuring.stopwatch import OtherData, in_turns, seconds_of


@pytest.fixture
def clock(monkeypatch):
    """A clock that only work moves on."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_seconds_are_those_of_the_run(clock):
    def run():
        clock[0] += 2.5

    assert seconds_of(run, "cpu") == 2.5


@pytest.mark.parametrize(("run_s", "turns"), [(10.0, 3), (0.5, 4), (0.01, 9)])
def test_short_runs_take_more_turns(clock, run_s, turns):
    count = itertools.count()

    def run():
        clock[0] += run_s
        return next(count)

    first, second = in_turns([run, run], limit_s=4.0)
    assert first == list(range(0, 2 * turns, 2))
    assert second == list(range(1, 2 * turns, 2))


def test_other_data_is_written_each_time():
    others = OtherData("cpu")
    assert others._data.nbytes == OtherData.num_bytes
    others.use()
    others.use()
    assert torch.equal(others._data.unique(), torch.tensor([2], dtype=torch.int8))
