"""Models of the comparison that read sequences: decoder, encoder-decoder, recurrent, and a very deep stack.

Written as users write them: blocks in an ``nn.ModuleList`` or ``nn.Sequential``, nothing that knows of checkpoints.
Shapes: N samples, T tokens, S source tokens, H heads, D features, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention through PyTorch's fused kernel; over ``memory`` where it is given."""

    def __init__(self, width: int, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor, memory_NSD: Tensor | None = None) -> Tensor:
        """Mix the tokens of ``x_NTD`` (or what they find in ``memory_NSD``)."""
        source_NSD = x_NTD if memory_NSD is None else memory_NSD
        keys, values = self.key_value(source_NSD).chunk(2, dim=-1)
        mixed_NHTd = functional.scaled_dot_product_attention(
            self._heads(self.query(x_NTD)),
            self._heads(keys),
            self._heads(values),
            is_causal=self.causal,
        )
        return self.out(mixed_NHTd.transpose(1, 2).flatten(2))

    def _heads(self, x_NTD: Tensor) -> Tensor:
        return x_NTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Attention, attention over a memory where there is one, and an MLP, each after a norm and added."""

    def __init__(
        self, width: int, num_heads: int, *, causal: bool = False, cross: bool = False
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads, causal=causal)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross = Attention(width, num_heads) if cross else None
        self.mlp_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor, memory_NSD: Tensor | None = None) -> Tensor:
        """The next hidden state."""
        x_NTD = x_NTD + self.attention(self.attention_norm(x_NTD))
        if self.cross is not None and self.cross_norm is not None:
            x_NTD = x_NTD + self.cross(self.cross_norm(x_NTD), memory_NSD)
        return x_NTD + self.down(functional.gelu(self.up(self.mlp_norm(x_NTD))))


class Decoder(nn.Module):
    """A GPT-2-shaped language model: learned positions, causal blocks, a head tied to the embedding."""

    def __init__(
        self, *, vocabulary: int, width: int, num_layers: int, num_heads: int, num_tokens: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(num_tokens, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, causal=True) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Logits ``[N, T, V]``."""
        places_T = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
        x_NTD = self.embed(tokens_NT) + self.positions(places_T)
        for block in self.blocks:
            x_NTD = block(x_NTD)
        return self.head(self.norm(x_NTD))


class EncoderDecoder(nn.Module):
    """A T5-like model: an encoder, a decoder that attends to its last state, and one tied embedding."""

    def __init__(
        self, *, vocabulary: int, width: int, num_layers: int, num_heads: int, num_tokens: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(num_tokens, width)
        self.encoder = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(num_layers))
        self.decoder = nn.ModuleList(
            TransformerBlock(width, num_heads, causal=True, cross=True) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, source_NS: Tensor, target_NT: Tensor) -> Tensor:
        """Logits ``[N, T, V]`` of the target."""
        memory_NSD = self._embedded(source_NS)
        for block in self.encoder:
            memory_NSD = block(memory_NSD)
        x_NTD = self._embedded(target_NT)
        for block in self.decoder:
            x_NTD = block(x_NTD, memory_NSD)
        return self.head(self.norm(x_NTD))

    def _embedded(self, tokens_NT: Tensor) -> Tensor:
        places_T = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
        return self.embed(tokens_NT) + self.positions(places_T)


class RecurrentLayer(nn.Module):
    """One LSTM layer that returns its outputs alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """The hidden state after each token."""
        return self.lstm(x_NTD)[0]


class RecurrentModel(nn.Module):
    """An LSTM language model with a tied head."""

    def __init__(self, *, vocabulary: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(RecurrentLayer(width) for _ in range(num_layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Logits ``[N, T, V]``."""
        x_NTD = self.embed(tokens_NT)
        for layer in self.layers:
            x_NTD = layer(x_NTD)
        return self.head(x_NTD)


class NormLinearGelu(nn.Module):
    """One layer of a residual stack."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x_ND: Tensor) -> Tensor:
        """``x + gelu(linear(norm(x)))``."""
        return x_ND + functional.gelu(self.linear(self.norm(x_ND)))


class DeepStack(nn.Module):
    """Very many residual layers, and a head: a planner's time and a step's overhead show here.

    On narrow rows (of 64, say) an operation takes as long as the Python around it; the zoo's have 256.
    """

    def __init__(self, *, width: int, num_layers: int, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(NormLinearGelu(width) for _ in range(num_layers)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.head(self.layers(x_ND))
