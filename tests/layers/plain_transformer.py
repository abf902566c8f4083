"""A pre-norm Transformer layer cut where a blockwise one needs it, and the same layer computed whole."""

import torch
from tests.layers.plain_attention import plain_attention
from torch import nn

from slimgrad.layers.blockwise_transformer import BlockwiseTransformer
from slimgrad.layers.memory_efficient_attention import memory_efficient_attention


def turned(x_BHND, cos_ND, sin_ND):
    """Rotary positions, half against half."""
    first, second = x_BHND.chunk(2, -1)
    return x_BHND * cos_ND + torch.cat([-second, first], -1) * sin_ND


class Heads(nn.Module):
    """Norm, one projection, heads apart."""

    def __init__(self, norm, project, num_heads):
        super().__init__()
        self.norm, self.project, self.num_heads = norm, project, num_heads

    def forward(self, x_BNC, cos=None, sin=None):
        x_BHND = self.project(self.norm(x_BNC)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x_BHND if cos is None else turned(x_BHND, cos, sin)


class KeysValues(nn.Module):
    def __init__(self, norm, width, head_width, num_groups):
        super().__init__()
        self.keys = Heads(norm, nn.Linear(width, num_groups * head_width), num_groups)
        self.values = Heads(norm, nn.Linear(width, num_groups * head_width), num_groups)

    def forward(self, x_BNC, *tables):
        return self.keys(x_BNC, *tables), self.values(x_BNC)


class Finish(nn.Module):
    """Output projection, residual, feed-forward network with dropout."""

    def __init__(self, width, dropout, expansion=4):
        super().__init__()
        self.out, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Linear(expansion * width, width),
            nn.Dropout(dropout),
        )

    def forward(self, x_BNC, attended_BHNE, *tables):
        x_BNC = x_BNC + self.out(attended_BHNE.transpose(1, 2).flatten(2))
        return x_BNC + self.mlp(self.norm(x_BNC))


def make_layer(width=12, num_heads=2, num_groups=None, dropout=0.0, dtype=torch.float64, **options):
    torch.manual_seed(0)
    norm = nn.LayerNorm(width)  # shared by both
    queries = Heads(norm, nn.Linear(width, width), num_heads)
    keys_values = KeysValues(norm, width, width // num_heads, num_groups or num_heads)
    layer = BlockwiseTransformer(queries, keys_values, Finish(width, dropout), **options)
    return layer.to(dtype)


def plain_layer(layer, x_BNC, mask=None, bias=None, along=(), block=None):
    """The layer with whole tensors; ``finish`` in blocks of ``block`` tokens, as its random draws then go."""
    attended = plain_attention(
        layer.queries(x_BNC, *along),
        *layer.keys_values(x_BNC, *along),
        mask,
        bias,
        is_causal=layer._rule.is_causal,
    )
    if block is None:
        return layer.finish(x_BNC, attended, *along)
    parts = zip(x_BNC.split(block, 1), attended.split(block, 2), strict=True)
    return torch.cat([layer.finish(x, a) for x, a in parts], 1)


class PlainTransformer(nn.Module):
    """Layers with whole tensors: ``attention`` is "whole" (score matrices) or "tiled"."""

    def __init__(self, layers, attention):
        super().__init__()
        self.layers, self.attention = nn.ModuleList(layers), attention

    def forward(self, x_BNC):
        for layer in self.layers:
            query, (key, value) = layer.queries(x_BNC), layer.keys_values(x_BNC)
            if self.attention == "tiled":
                attended = memory_efficient_attention(
                    query, key, value, backend="chunked", query_chunk=64, key_chunk=128
                )
            else:
                attended = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value
            x_BNC = layer.finish(x_BNC, attended)
        return x_BNC
