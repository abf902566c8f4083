"""A Transformer over segments with memory slots: read by every layer, written once a segment, of one size for ever.

Formula: per layer h = h + SelfAttn(LN h), h = h + CrossAttn(LN h, sqrt(d) M), h = h + FFN(LN h); then for slot i, with queries
    and keys q, k of the normed slots and segment, A = softmax([q_i.k_i, q_i.k(h)] / (sqrt d tau)),
    m_i' = A [v(m_i); v(h)] and m_i = (m_i' + b_i) / |m_i' + b_i|, b a learned bias and b/|b| the first memory
Memory: activations of one segment; from segment to segment the slots alone, B x num_slots x dim, however long the
    sequence: inference runs in constant memory, training by ``memory_replay`` in one segment's plus the slots of each.
Exactness: different: another architecture than a Transformer over the whole sequence; its gradients are autograd's.
Limits: what is not written into the slots is forgotten; slots do not see each other when they are written; positions are
    within the segment, at most ``max_length``; no padding mask.
References: Wu et al. (2020), sections 3.2 to 3.4. *departs:* an encoder alone, pre-normed, with learned positions; values
    of old slots are taken as they are, those of the segment projected; a slot's own weight starts high (``keep``), so
    that what was written lasts while nothing has been learned yet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.errors import BatchError, MethodError
from slimgrad.method import Paper, component
from slimgrad.types import Column, Exactness


class _Attention(nn.Module):
    """Attention of ``x`` over ``context``, by heads."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, context: Tensor, is_causal: bool = False) -> Tensor:
        q, (k, v) = self.query(x), self.key_value(context).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out(made.transpose(1, 2).flatten(-2))


class _Layer(nn.Module):
    """Self-attention, reading of the memory, feed-forward."""

    def __init__(self, dim: int, num_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.own, self.read = _Attention(dim, num_heads), _Attention(dim, num_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.own(y, y, self.is_causal)
        x = x + self.read(self.norms[1](x), memory)
        return x + self.feed_forward(self.norms[2](x))


class _Writer(nn.Module):
    """New slots from old ones and a segment; each slot attends to itself and to the segment's tokens."""

    def __init__(self, dim: int, num_slots: int, temperature: float, keep: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(0.01 / dim**0.5 * torch.randn(num_slots, dim))
        self.keep = nn.Parameter(torch.full((num_slots, 1), keep))
        self.norm = nn.LayerNorm(dim)
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.scale = 1 / (dim**0.5 * temperature)

    def forward(self, x_BTD: Tensor, memory_BKD: Tensor) -> Tensor:
        slots = self.norm(memory_BKD)
        query = self.query(slots) * self.scale
        own = (query * self.key(slots)).sum(-1, keepdim=True) + self.keep
        weights = torch.cat([own, query @ self.key(x_BTD).transpose(1, 2)], -1).softmax(-1)
        written = weights[..., :1] * memory_BKD + weights[..., 1:] @ F.normalize(
            self.value(x_BTD), dim=-1
        )
        return F.normalize(written + self.bias, dim=-1)


@component(
    Column.ACTIVATIONS,
    Exactness.DIFFERENT,
    Paper(
        "Memformer: A Memory-Augmented Transformer for Sequence Modeling",
        "Qingyang Wu, Zhenzhong Lan, Kun Qian, Jing Gu, Alborz Geramifard, Zhou Yu",
        2020,
        "2010.06891",
    ),
)
class Memformer(nn.Module):
    """``y, memory = layer(x, memory)`` for one segment ``x`` [B, T, dim] and ``memory`` [B, num_slots, dim].

    ``initial_memory(batch_size)`` is the first one. ``temperature`` below 1 sharpens what a slot attends to when it is
    written. Raises ``MethodError`` for sizes that do not go together and ``BatchError`` for a segment longer than
    ``max_length``.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int = 2,
        num_heads: int = 4,
        num_slots: int = 16,
        *,
        max_length: int = 512,
        is_causal: bool = False,
        temperature: float = 0.25,
        keep: float = 4.0,
    ) -> None:
        super().__init__()
        if dim % num_heads or min(num_layers, num_slots, max_length) < 1 or temperature <= 0:
            raise MethodError(
                f"dim={dim} must divide by num_heads={num_heads}, and num_layers={num_layers}, num_slots="
                f"{num_slots}, max_length={max_length} and temperature={temperature} must be positive"
            )
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, dim))
        self.layers = nn.ModuleList(_Layer(dim, num_heads, is_causal) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)
        self.writer = _Writer(dim, num_slots, temperature, keep)

    def initial_memory(self, batch_size: int) -> Tensor:
        """The memory before the first segment: the normed biases [batch_size, num_slots, dim]."""
        return F.normalize(self.writer.bias, dim=-1).expand(batch_size, -1, -1)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The segment's hidden states and the memory after it."""
        if x.shape[1] > len(self.positions):
            raise BatchError(
                f"a segment of {x.shape[1]} tokens is longer than max_length={len(self.positions)}"
            )
        x = x + self.positions[: x.shape[1]]
        read = (
            memory * memory.shape[-1] ** 0.5
        )  # slots have length 1, tokens entries of about that size
        for layer in self.layers:
            x = layer(x, read)
        x = self.norm(x)
        return x, self.writer(x, memory)
