"""Every store of codes in the catalogue on sample models: values, errors, bytes, undo. Nothing is listed by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.coding.unbiased import DRAWS, assert_mean
from tests.every_method.coded_blocks import (
    Coded,
    coded_settings,
    one_pass,
    programme_of,
    sensitive_profile,
    stores,
)
from tests.sample_models import SAMPLES, adamw
from tests.single_method_plans import host_of, measured_peak, plan_of, predicted_peak
from torch import Tensor, nn
from torch.nn import functional

from slimgrad import measure
from slimgrad.applying.step import apply
from slimgrad.method import Refusal
from slimgrad.types import Exactness
from slimgrad.verifying.gradient import relative_error, same_bits

QUICK = ("mlp", "conv_batchnorm", "attention", "llama", "tied")  # of the last no tensor is large
PAIRS = [pytest.param(m, s, id=f"{m}-{s}") for m in stores() for s in QUICK]
SQUARES = (
    1.5  # the square of the error on all blocks is at most so much of the sum of their squares
)

SCRATCH_BYTES = 2**15  # of a code at work, for tensors as small as these


def settings_or_skip(name: str, sample: str) -> list[Coded]:
    """The settings on the blocks that they suit, or a visible skip with the store's own reason."""
    found = coded_settings(sensitive_profile(sample), stores()[name])
    if isinstance(found, Refusal):
        assert len(found.reason) > 10
        pytest.skip(f"refused: {found.reason}")
    return found


@pytest.mark.parametrize(("name", "sample"), PAIRS)
def test_the_loss_is_plains_and_the_gradients_error_is_what_was_measured(
    name: str, sample: str
) -> None:
    settings = settings_or_skip(name, sample)
    plain_loss, plain = one_pass(*SAMPLES[sample].make())
    random = torch.get_rng_state()
    for coded in settings:
        model, loss_fn, batch = SAMPLES[sample].make()
        coded.attach(host_of(model, None, loss_fn))
        loss, gradients = one_pass(model, loss_fn, batch)
        assert torch.equal(loss, plain_loss)
        assert torch.equal(torch.get_rng_state(), random)
        error = relative_error(gradients, plain)
        squares = sum(record.squared_error for record in coded.records.values())
        assert 0 < error**2 <= SQUARES * squares, f"{coded.choices[0].fields}: {error**2 / squares}"


@pytest.mark.parametrize(("name", "sample"), PAIRS)
def test_predicted_peak_is_the_measured_one(name: str, sample: str) -> None:
    profile = sensitive_profile(sample)
    for coded in settings_or_skip(name, sample):
        programme = programme_of(profile, coded)
        predicted = predicted_peak(programme)
        model, loss_fn, batch = SAMPLES[sample].make()
        optimizer = adamw(model)
        with apply(plan_of(model, optimizer, coded.choices), model, optimizer, loss_fn) as step:
            measured = measured_peak(step, batch)
        assert predicted + SCRATCH_BYTES >= 0.97 * measured
        live = programme.replay(np.ones(len(programme.menu.options)))[0]
        above = 0  # in a block's forward, what it lets go of is counted to its end
        if "forward of" in programme.layout.where(int(live.argmax())):
            above = max(r.saved_bytes for r in coded.records.values())
        assert predicted <= 1.03 * measured + above, coded.choices[0]


@pytest.mark.parametrize(("name", "sample"), PAIRS)
def test_undo_leaves_nothing(name: str, sample: str) -> None:
    settings = settings_or_skip(name, sample)
    loss, plain = one_pass(*SAMPLES[sample].make())
    model, loss_fn, batch = SAMPLES[sample].make()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    host = host_of(model, None, loss_fn)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    for coded in settings:
        undo = coded.attach(host)
        assert host.codes.keys() == coded.by_path.keys()
        one_pass(model, loss_fn, batch)
        undo()
        assert host.codes == {}
        assert {path: set(vars(module)) for path, module in model.named_modules()} == before
        for buffer_name, buffer in model.named_buffers():
            buffer.copy_(buffers[buffer_name])
        found = one_pass(model, loss_fn, batch)
        assert torch.equal(found[0], loss)
        assert same_bits(found[1], plain)
        for buffer_name, buffer in model.named_buffers():
            buffer.copy_(buffers[buffer_name])


UNBIASED = [name for name, cls in stores().items() if cls.exactness is Exactness.UNBIASED]


class Products(nn.Module):
    """A block of which both products save a tensor, and the activation function one that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.down(functional.gelu(self.up(self.norm(x_ND))))


def products() -> tuple[nn.Module, Tensor]:
    """Three blocks in float64 that save tensors of 16 KiB, and a batch ``[64, 32]``."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Products() for _ in range(3)))
    return model.double(), torch.randn(64, 32, dtype=torch.float64)


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss."""
    return model(batch).square().mean()


@pytest.mark.parametrize("name", UNBIASED)
def test_the_gradients_mean_over_draws_is_plains(name: str) -> None:
    model, batch = products()
    kwargs = {"limit_s": 0.0, "allow_compile": False, "sensitivity": True}
    profile = measure(model, None, mean_square, batch, **kwargs)
    settings = coded_settings(profile, stores()[name])
    assert not isinstance(settings, Refusal)

    def gradient() -> Tensor:
        found = one_pass(model, mean_square, batch)[1]
        return torch.cat([g.flatten() for g in found.values()])

    plain = gradient()
    for coded in settings:
        undo = coded.attach(host_of(model, None, mean_square))
        drawn = [gradient() for _ in range(DRAWS)]
        undo()
        varying = torch.stack(drawn).std(0) > 0
        assert varying.any()
        assert not varying.all()  # biases' gradients have no error
        assert_mean(iter(drawn).__next__, plain)
        with pytest.raises(AssertionError, match="are off"):
            assert_mean(iter([0.9 * g for g in drawn]).__next__, plain)


def test_there_is_an_unbiased_store_and_a_biased_one() -> None:
    assert UNBIASED
    assert len(UNBIASED) < len(stores())
