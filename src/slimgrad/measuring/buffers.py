"""A model's buffers, put back where they were: a forward pass may write into one, or put another tensor in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Buffers:
    """Every buffer of a model by its place: the table that holds it, its name, the tensor itself, its values."""

    places: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]

    @staticmethod
    def of(model: nn.Module) -> Buffers:
        """Copy every buffer."""
        return Buffers(
            [
                (module._buffers, name, buffer, buffer.detach().clone())
                for module in model.modules()
                for name, buffer in module._buffers.items()
                if buffer is not None
            ]
        )

    def restore(self) -> None:
        """Put the user's own tensors back in their places, with the values that they had."""
        with torch.no_grad():
            for table, name, buffer, value in self.places:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                table[name] = buffer
