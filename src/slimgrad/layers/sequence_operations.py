"""Candidates for layers of a Transformer, each on a stream (batch, tokens, width), with its own norm first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import ArgumentError

Operations: TypeAlias = Mapping[str, Callable[[], nn.Module] | None]
"""How to make each candidate, by name; None is the zero operation."""


def sequence_operations(
    width: int, *, num_heads: int = 4, expansion: int = 4, is_causal: bool = False
) -> Operations:
    """Zero, identity, convolutions over 3 and 7 tokens, attention, a feed-forward network and a gated linear unit.

    With ``is_causal`` no output depends on a later token. Raises ArgumentError where heads do not divide the width.
    """
    if width % num_heads:
        raise ArgumentError(f"expected a width that {num_heads} heads divide, found {width}")
    return {
        "zero": None,
        "identity": nn.Identity,
        "convolution_3": partial(TokenConvolution, width, 3, is_causal),
        "convolution_7": partial(TokenConvolution, width, 7, is_causal),
        "attention": partial(SelfAttention, width, num_heads, is_causal),
        "feed_forward": partial(feed_forward, width, expansion),
        "gated": partial(GatedLinear, width),
    }


class SelfAttention(nn.Module):
    """Scaled dot-product attention of the tokens to each other."""

    def __init__(self, width: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.norm, self.into, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.num_heads, self.is_causal = num_heads, is_causal

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.into(self.norm(x_BNC)).chunk(3, -1)
        )
        attended_BHND = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.is_causal
        )
        return self.out(attended_BHND.transpose(1, 2).flatten(2))


class TokenConvolution(nn.Module):
    """A convolution along the tokens, ``size`` of them, zeros beyond the ends."""

    def __init__(self, width: int, size: int, is_causal: bool = False) -> None:
        super().__init__()
        self.norm, self.convolution = nn.LayerNorm(width), nn.Conv1d(width, width, size)
        self.padding = (size - 1, 0) if is_causal else (size // 2, (size - 1) // 2)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        x_BCN = functional.pad(self.norm(x_BNC).transpose(1, 2), self.padding)
        return self.convolution(x_BCN).transpose(1, 2)


class GatedLinear(nn.Module):
    """Half of a linear map, times the sigmoid of the other half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, 2 * width)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """(batch, tokens, width) to the same shape."""
        return functional.glu(self.linear(self.norm(x_BNC)), -1)


def feed_forward(width: int, expansion: int) -> nn.Sequential:
    """Two linear maps around a GELU."""
    inner = expansion * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)
    )
