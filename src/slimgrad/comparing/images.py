"""Models of the comparison that read images: ResNet-50, a vision transformer, a U-Net.

Shapes: N samples, C channels, H and W pixels, T patches, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.comparing.sequences import TransformerBlock


class Bottleneck(nn.Module):
    """A residual block of ResNet-50: 1x1, 3x3 and 1x1 convolutions with batch norm, ReLU in place.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, figure 5 (the stride is on the 3x3
    convolution, as in later implementations).
    """

    def __init__(self, channels: int, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(inner)
        self.convolve = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(inner)
        self.expand = nn.Conv2d(inner, outer, 1, bias=False)
        self.norm_3 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels == outer
        self.shortcut = None if same else nn.Conv2d(channels, outer, 1, stride, bias=False)
        self.shortcut_norm = None if same else nn.BatchNorm2d(outer)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The next feature map."""
        kept = x_NCHW
        if self.shortcut is not None and self.shortcut_norm is not None:
            kept = self.shortcut_norm(self.shortcut(x_NCHW))
        x_NCHW = self.relu(self.norm_1(self.reduce(x_NCHW)))
        x_NCHW = self.relu(self.norm_2(self.convolve(x_NCHW)))
        x_NCHW = self.norm_3(self.expand(x_NCHW))
        x_NCHW += kept
        return self.relu(x_NCHW)


class ResNet(nn.Module):
    """A ResNet of bottleneck blocks; ``depths`` (3, 4, 6, 3) and ``width`` 64 make ResNet-50."""

    def __init__(
        self, *, depths: Sequence[int] = (3, 4, 6, 3), width: int = 64, num_classes: int = 1000
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        blocks: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Bottleneck(channels, inner, 4 * inner, stride))
                channels = 4 * inner
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits of the classes."""
        x_NCHW = self.pool(self.relu(self.stem_norm(self.stem(x_NCHW))))
        return self.head(self.blocks(x_NCHW).mean((2, 3)))


class VisionTransformer(nn.Module):
    """Patches, positions, transformer blocks, the mean over patches, and a head."""

    def __init__(
        self,
        *,
        image: int,
        patch: int,
        width: int,
        num_layers: int,
        num_heads: int,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Logits of the classes."""
        x_NTD = self.patches(x_NCHW).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x_NTD)).mean(1))


class ConvolutionPair(nn.Module):
    """Two convolutions, each after a group norm and SiLU, with a residual connection."""

    def __init__(self, channels: int, outer: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(8, channels)
        self.convolve_1 = nn.Conv2d(channels, outer, 3, padding=1)
        self.norm_2 = nn.GroupNorm(8, outer)
        self.convolve_2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, outer, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """The next feature map, of the same size."""
        inner = self.convolve_1(functional.silu(self.norm_1(x_NCHW)))
        return self.shortcut(x_NCHW) + self.convolve_2(functional.silu(self.norm_2(inner)))


class UNet(nn.Module):
    """A U-Net that predicts an image of the input's size: what each level going down made is kept for going up."""

    def __init__(self, *, width: int, num_levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(num_levels)]
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList(
            ConvolutionPair(widths[max(0, level - 1)], widths[level]) for level in range(num_levels)
        )
        self.up = nn.ModuleList(
            ConvolutionPair(widths[level] + widths[level + 1], widths[level])
            for level in reversed(range(num_levels - 1))
        )
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """An image of the input's size."""
        x_NCHW = self.stem(x_NCHW)
        kept: list[Tensor] = []
        for i, block in enumerate(self.down):
            x_NCHW = block(x_NCHW if i == 0 else functional.avg_pool2d(x_NCHW, 2))
            kept.append(x_NCHW)
        kept.pop()
        for block in self.up:
            x_NCHW = functional.interpolate(x_NCHW, scale_factor=2.0)
            x_NCHW = block(torch.cat((x_NCHW, kept.pop()), 1))
        return self.head(x_NCHW)
