"""Seconds of bringing weights from memory, which operations timed alone do not see."""

import pytest
import torch
from torch import nn

import slimgrad
from slimgrad.planning.offers import Allowed, schemes
from slimgrad.types import Exactness


def profile_of(num_rows: int, *, frozen: bool = False) -> slimgrad.Profile:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    if frozen:
        model[0].requires_grad_(False)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = torch.randn(num_rows, 64), torch.randint(0, 8, (num_rows,))

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return slimgrad.measure(model, sgd, loss_fn, batch, allow_compile=False)


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_are_brought_without_gradients(frozen):
    profile = profile_of(8, frozen=frozen)
    first, second = 4 * (64 * 64 + 64), 4 * (64 * 8 + 8)
    moved = 4 * second + (2 if frozen else 4) * first
    assert profile.weights_s == pytest.approx(moved / profile.rates.bytes_per_s)
    assert profile.seconds > profile.forward_s + profile.backward_s + profile.update_s


def test_every_micro_batch_brings_the_weights_again():
    profile = profile_of(8)
    allowed = Allowed(Exactness.EXACT)
    found = {s.record.micro_batches: s for s in schemes(profile, allowed) if not s.record.extra_s}
    assert len(found) > 1
    for parts, scheme in found.items():
        rest = scheme.seconds - scheme.weights_s * parts
        passes = float(scheme.trace.op_seconds.sum()) * scheme.repeats
        assert rest == pytest.approx(max(passes, scheme.plain_s) + scheme.record.update_s)
