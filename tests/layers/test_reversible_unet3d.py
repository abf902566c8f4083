"""The reversible 3-D U-Net against its own stored activations."""

import pytest
import torch

from slimgrad import Ledger
from slimgrad.errors import ArgumentError
from slimgrad.layers.reversible_unet3d import ReversibleUnet3d
from slimgrad.types import Column


def test_float64_gradients_are_those_of_stored_activations() -> None:
    found = []
    volume = torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
    for is_reversible in (True, False):
        torch.manual_seed(0)
        model = ReversibleUnet3d(
            1, 2, width=4, levels=3, blocks_per_level=2, is_reversible=is_reversible
        ).double()
        model(volume).square().mean().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="even width"):
        ReversibleUnet3d(1, 2, width=3)
    with pytest.raises(ArgumentError, match="divisible by 4"):
        ReversibleUnet3d(1, 2, width=4)(torch.randn(1, 1, 6, 8, 8))


def _activation_peak(width: int, blocks: int, is_reversible: bool) -> int:
    model = ReversibleUnet3d(
        1, 2, width=width, levels=2, blocks_per_level=blocks, is_reversible=is_reversible
    )
    volume = torch.randn(1, 1, 16, 16, 16)
    with Ledger(model, inputs=volume) as ledger:
        model(volume).square().mean().backward()
    held = ledger.timeline.columns
    return int((held[Column.ACTIVATIONS] + held[Column.TEMPORARIES]).max())


def test_bytes_are_flat_as_blocks_per_level_grow() -> None:
    two, six = (_activation_peak(8, blocks, True) for blocks in (2, 6))
    plain_two, plain_six = (_activation_peak(8, blocks, False) for blocks in (2, 6))
    print(two, six, plain_two, plain_six)
    assert six <= 1.02 * two
    assert plain_six > 2 * plain_two


def test_twice_the_channels_fit_the_bytes_of_the_plain_network() -> None:
    plain, reversible = _activation_peak(8, 4, False), _activation_peak(16, 4, True)
    print(plain, reversible)
    assert reversible <= plain
