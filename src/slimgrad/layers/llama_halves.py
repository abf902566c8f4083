"""A Llama-like layer as two modules that treat every token alone: what is before its attention, and what is after."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from slimgrad.errors import UnsupportedError

_PARTS: Final = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")


def llama_layers(model: nn.Module) -> list[Any]:
    """The layers of ``model`` that have a Llama layer's parts; raises ``UnsupportedError`` where there is none."""
    found = [m for m in model.modules() if all(hasattr(m, part) for part in _PARTS)]
    found = [m for m in found if all(hasattr(m.self_attn, p) for p in _PROJECTIONS)]
    if not found:
        raise UnsupportedError(
            f"expected a model with Llama-like layers ({', '.join(_PARTS)}), found none in {type(model).__name__}"
        )
    for layer in found:
        attention: Any = layer.self_attn
        if getattr(attention, "attention_dropout", 0.0) or hasattr(attention, "q_norm"):
            raise UnsupportedError(
                "expected attention without dropout and without norms of queries, found "
                f"{type(attention).__name__} with one of them"
            )
    return found


def _turned(t_BHnD: Tensor, cos_BnD: Tensor, sin_BnD: Tensor) -> Tensor:
    """Rotary positions: pairs of features half a width apart, each turned by its angle."""
    first, second = t_BHnD.chunk(2, -1)
    quarter = torch.cat((-second, first), -1)
    return t_BHnD * cos_BnD.unsqueeze(1) + quarter * sin_BnD.unsqueeze(1)


class Before(nn.Module):
    """Norm, projections and rotary positions of a layer: queries, keys and values of some tokens."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.norm, attention = layer.input_layernorm, layer.self_attn
        self.q, self.k, self.v = attention.q_proj, attention.k_proj, attention.v_proj
        self.width: int = attention.head_dim

    def forward(self, x_BnC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, H, n, D]`` of queries, ``[B, K, n, D]`` of keys and of values."""
        normed = self.norm(x_BnC)
        q, k, v = (
            part(normed).unflatten(-1, (-1, self.width)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        return _turned(q, cos, sin), _turned(k, cos, sin), v


class After(nn.Module):
    """Output projection, residuals, norm and feed-forward network of a layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.out = layer.self_attn.o_proj
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, x_BnC: Tensor, attended: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The layer's output for some tokens."""
        x_BnC = x_BnC + self.out(attended.transpose(1, 2).flatten(2))
        return x_BnC + self.mlp(self.norm(x_BnC))
