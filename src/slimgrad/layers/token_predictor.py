"""How much attention tokens get, and small networks that tell it from what goes into a layer.

Shapes: N sequences, H heads, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad.errors import UnsupportedError

_LEAST = 1e-3  # of a token's share, under the logarithm


class Predictor(nn.Module):
    """h_NTD -> scores (N, T), from each token and the mean of all of them; weights from ``seed``."""

    def __init__(self, features: int, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.into, self.out = nn.Linear(2 * features, width), nn.Linear(width, 1)

    def forward(self, h_NTD: Tensor) -> Tensor:
        """Scores whose order counts, and nothing else."""
        h_NTD = functional.layer_norm(h_NTD.to(self.into.weight.dtype), h_NTD.shape[-1:])
        context_NTD = h_NTD.mean(1, keepdim=True).expand_as(h_NTD)
        return self.out(functional.gelu(self.into(torch.cat([h_NTD, context_NTD], -1))))[..., 0]

    @torch.enable_grad()
    def fit(
        self, inputs: Iterable[Tensor], scores: Iterable[Tensor], num_steps: int, lr: float
    ) -> None:
        """Least squares on scores brought to mean 0 and deviation 1, a batch a step."""
        pairs = list(zip(inputs, scores, strict=True))
        told = torch.cat([s_NT.flatten() for _, s_NT in pairs])
        mean, deviation = told.mean(), told.std()
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        for step in range(num_steps):
            h_NTD, s_NT = pairs[step % len(pairs)]
            optimizer.zero_grad()
            functional.mse_loss(self(h_NTD), (s_NT - mean) / deviation).backward()
            optimizer.step()


def attention_shares(weights_NHTT: Tensor) -> Tensor:
    """Log of the attention that each token gets against what it would get if causal attention were even, (N, T)."""
    num_tokens = weights_NHTT.shape[-1]
    got_NT = weights_NHTT.float().mean(1).sum(1)
    even_T = 1 / torch.arange(1, num_tokens + 1, device=got_NT.device)
    return (got_NT / even_T.flip(0).cumsum(0).flip(0) + _LEAST).log()


def beside_position(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores (N, T) less the mean of all those at the same position, so that no place in a text is preferred."""
    longest = max(score_NT.shape[1] for score_NT in scores)
    total_T, num_T = torch.zeros(longest), torch.zeros(longest)
    for score_NT in scores:
        num_tokens = score_NT.shape[1]
        total_T[:num_tokens] += score_NT.float().sum(0).cpu()
        num_T[:num_tokens] += len(score_NT)
    mean_T = (total_T / num_T.clamp(min=1)).to(scores[0].device)
    return [score_NT - mean_T[: score_NT.shape[1]] for score_NT in scores]


def recall(index_NK: Tensor, scores_NT: Tensor) -> float:
    """The share of the K highest scores that ``index_NK`` holds."""
    best_NK = scores_NT.topk(index_NK.shape[1], dim=1).indices
    found_NKK = best_NK[:, :, None] == index_NK[:, None, :]
    return float(found_NKK.any(-1).double().mean())


@torch.no_grad()
def received_attention(
    model: nn.Module, layers: Sequence[nn.Module], wanted: Sequence[int], batch: Mapping[str, Any]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each wanted layer: its input (N, T, D), and ``attention_shares`` of its attention on ``batch``.

    Raises UnsupportedError where the layers' attention does not give its weights.
    """
    config: Any = getattr(model, "config", None)
    implementation = getattr(config, "_attn_implementation", None)
    inputs: dict[int, Tensor] = {}
    scores: dict[int, Tensor] = {}

    def before(number: int) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[number] = args[0] if args else kwargs["hidden_states"]

        return keep

    def after(number: int) -> Any:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) else None
            if not isinstance(weights, Tensor) or weights.dim() != 4:
                raise UnsupportedError(
                    "expected attention that gives its weights when run as 'eager', found none"
                )
            scores[number] = attention_shares(weights)

        return keep

    handles: list[Any] = []
    try:
        if implementation is not None:
            config._attn_implementation = "eager"
        for number in wanted:
            attention: Any = layers[number].self_attn
            handles.append(
                layers[number].register_forward_pre_hook(before(number), with_kwargs=True)
            )
            handles.append(attention.register_forward_hook(after(number)))
        model(**batch)
    finally:
        if implementation is not None:
            config._attn_implementation = implementation
        for handle in handles:
            handle.remove()
    return {number: (inputs[number], scores[number]) for number in wanted}
