"""Timing operations alone: what is run and what is not. Nothing is asserted on the time itself."""

import numpy as np
import pytest
import torch
from tests.sample_models import SAMPLES, adamw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad import Ledger, measure
from slimgrad.host import Share
from slimgrad.measuring.clock import Rates, op_bytes, op_flops, op_key, time_operations
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.trace import trace_step

aten = torch.ops.aten


@pytest.fixture(scope="module")
def keys():
    found = {}
    for name in ("mlp", "attention", "conv_batchnorm"):
        model, loss_fn, batch = SAMPLES[name].make()
        trace_step(model, loss_fn, [Share(batch)], [], found)
    return list(found)


def _product(n, k, m):
    return op_key(aten.mm.default, (torch.empty(n, k), torch.empty(k, m)), {})


def test_equal_calls_are_one_operation():
    assert _product(2, 3, 4) == _product(2, 3, 4)
    assert _product(2, 3, 4) != _product(2, 4, 4)
    transposed = op_key(aten.mm.default, (torch.empty(3, 2).t(), torch.empty(3, 4)), {})
    assert transposed != _product(2, 3, 4)
    assert len({_product(2, 3, 4), _product(2, 3, 4), transposed}) == 2


@pytest.mark.parametrize(("n", "k", "m"), [(2, 3, 4), (64, 32, 16)])
def test_bytes_and_flops_of_a_product(n, k, m):
    assert op_bytes(_product(n, k, m)) == 4 * (n * k + k * m)
    assert op_flops(_product(n, k, m)) == 2 * n * k * m


def test_what_is_no_product_has_no_flops():
    assert op_flops(op_key(aten.add.Tensor, (torch.empty(8), torch.empty(8)), {})) == 0


def test_every_operation_gets_seconds(keys):
    seconds, rates = time_operations(keys)
    assert seconds.shape == (len(keys),)
    assert np.isfinite(seconds).all()
    assert (seconds > 0).all()
    assert rates.flops_per_s > 0
    assert rates.bytes_per_s > 0


def test_without_time_every_operation_is_estimated_from_the_stated_rates(keys):
    seconds, rates = time_operations(keys, limit_s=0.0)
    assert rates == Rates()
    product = keys.index(next(k for k in keys if op_flops(k) > 0))
    expected = rates.overhead_s + op_flops(keys[product]) / rates.flops_per_s
    assert seconds[product] == pytest.approx(expected)


def test_timing_draws_from_no_generator(keys):
    before = RandomState.now()
    time_operations(keys, limit_s=1.0)
    assert RandomState.now().same_as(before)


class _LargestInput(TorchDispatchMode):
    """The most bytes that the tensor arguments of any operation span."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in args if isinstance(t, torch.Tensor) and t.device.type == "cpu"]
        self.nbytes = max(self.nbytes, sum(t.untyped_storage().nbytes() for t in tensors))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("limit_bytes", [2**14, 2**16, 2**20])
def test_nothing_larger_than_the_limit_is_allocated(keys, limit_bytes):
    with Ledger(device=torch.device("cpu")) as ledger, _LargestInput() as largest:
        time_operations(keys, limit_bytes=limit_bytes)
    assert 0 < ledger.peak_bytes <= limit_bytes
    assert largest.nbytes <= limit_bytes
    assert max(op_bytes(k) for k in keys) > 2**16  # the smaller limits leave something out


def test_measure_hands_its_limit_on(monkeypatch):
    """The plain step does not fit into the limit; its operations are timed within it."""
    peaks, limit = [], 100_000

    def watched(*args, **kwargs):
        with Ledger(device=torch.device("cpu")) as ledger:
            found = time_operations(*args, **kwargs)
        peaks.append(ledger.peak_bytes)
        return found

    monkeypatch.setattr("slimgrad.planning.profiling.time_operations", watched)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    x = torch.randn(256, 64)
    profile = measure(model, None, lambda m, b: m(b).square().mean(), x, limit_bytes=limit)
    assert profile.peak_bytes > 5 * limit
    assert 0 < peaks[0] <= limit


def test_seconds_reach_the_profile():
    model, loss_fn, batch = SAMPLES["mlp"].make()
    profile = measure(model, adamw(model), loss_fn, batch, limit_s=2.0)
    assert profile.forward_s > 0
    assert profile.backward_s > 0
    assert profile.update_s > 0
    assert all(np.isfinite(t.op_seconds).all() for t in profile.variants.values())
    rows = [(m.forward_s, m.backward_s) for m in profile.modules]
    assert sum(f for f, _ in rows) == pytest.approx(profile.forward_s)
    assert sum(b for _, b in rows) == pytest.approx(profile.backward_s)
