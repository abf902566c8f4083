"""The reversible 3-D U-Net against its own stored activations."""

import pytest
import torch
from tests.layers.ellipsoids import dice, trained_dice, volumes
from torch import nn

from slimgrad import Ledger
from slimgrad.errors import ArgumentError
from slimgrad.layers.reversible_unet3d import ReversibleUnet3d, inverted_bottleneck
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


def _ledger(width: int, blocks: int, is_reversible: bool) -> Ledger:
    model = ReversibleUnet3d(
        1, 2, width=width, levels=2, blocks_per_level=blocks, is_reversible=is_reversible
    )
    volume = torch.randn(1, 1, 16, 16, 16)
    with Ledger(model, inputs=volume) as ledger:
        model(volume).square().mean().backward()
    return ledger


def _activation_peak(ledger: Ledger) -> int:
    held = ledger.timeline.columns
    return int((held[Column.ACTIVATIONS] + held[Column.TEMPORARIES]).max())


def test_bytes_are_flat_as_blocks_per_level_grow() -> None:
    two, six = (_ledger(8, blocks, True) for blocks in (2, 6))
    plain_two, plain_six = (_ledger(8, blocks, False) for blocks in (2, 6))
    peaks = [_activation_peak(ledger) for ledger in (two, six, plain_two, plain_six)]
    print(peaks, two.columns[Column.ACTIVATIONS], six.columns[Column.ACTIVATIONS])
    assert six.columns[Column.ACTIVATIONS] == two.columns[Column.ACTIVATIONS]
    assert peaks[1] == peaks[0]
    assert peaks[3] > 2 * peaks[2]


def test_twice_the_channels_fit_the_bytes_of_the_plain_network() -> None:
    plain, reversible = _ledger(8, 4, False), _ledger(16, 4, True)
    print(plain.peak_bytes, reversible.peak_bytes, _ledger(16, 4, False).peak_bytes)
    assert _activation_peak(reversible) <= _activation_peak(plain)
    assert reversible.peak_bytes <= plain.peak_bytes  # weights and gradients are four times as many
    assert _ledger(16, 4, False).peak_bytes > 1.5 * plain.peak_bytes


class _Residual(nn.Module):
    """Inverted bottlenecks on all channels, each with its input added: what a reversible chain takes the place of."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.function = inverted_bottleneck(channels, 2)

    def forward(self, halves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x = torch.cat(halves, 1)
        return (x + self.function(x)).chunk(2, 1)


def _network(kind: str) -> ReversibleUnet3d:
    torch.manual_seed(0)
    made = ReversibleUnet3d(1, 1, width=8, levels=3, is_reversible=kind == "reversible")
    if kind == "residual":
        made.encoders = nn.ModuleList([_Residual(width) for width in (8, 16, 32)])
        made.decoders = nn.ModuleList([_Residual(width) for width in (8, 16)])
    return made


@pytest.mark.slow
def test_it_finds_ellipsoids_as_well_as_networks_that_are_not_reversible() -> None:
    inputs, masks = volumes(8, 9)
    kinds = ("reversible", "stored", "residual")
    found = {kind: trained_dice(_network(kind)) for kind in kinds}
    untrained = dice(_network("reversible")(inputs), masks)
    print(found, untrained, dice(inputs - 0.5, masks))
    assert abs(found["reversible"] - found["stored"]) < 0.02
    assert abs(found["reversible"] - found["residual"]) < 0.02
    assert found["reversible"] > 0.9 > max(untrained, dice(inputs - 0.5, masks)) + 0.1
