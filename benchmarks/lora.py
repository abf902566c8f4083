"""Low-rank adapters beside the linear layers of a model whose own weights stay as they are."""

from __future__ import annotations

from torch import Tensor, nn


class LoraLinear(nn.Module):
    """y = W x + (alpha / rank) B A x, W frozen and B zero at first.

    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, section 4.1.
    """

    def __init__(self, inner: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, alpha / rank
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.scale * self.up(self.down(x))


def add_lora(model: nn.Module, layers: nn.Module, rank: int = 8, alpha: float = 16.0) -> None:
    """Freeze ``model`` and put adapters beside every linear layer inside ``layers``, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for owner in list(layers.modules()):
        for name, inner in list(owner.named_children()):
            if isinstance(inner, nn.Linear):
                setattr(owner, name, LoraLinear(inner, rank, alpha))
