"""Random numbers of a code's own: the model's random stream is not touched, and a replay draws the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Draws:
    """A random stream for each device, each started from ``seed``."""

    seed: int
    _generators: dict[torch.device, torch.Generator] = field(
        default_factory=dict[torch.device, torch.Generator], compare=False, repr=False
    )

    def on(self, device: torch.device) -> torch.Generator:
        """The generator for tensors on ``device``."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def number(self) -> int:
        """A random number, the seed of a kernel's own stream."""
        generator = self.on(torch.device("cpu"))
        return int(torch.randint(2**31 - 1, (), generator=generator))

    def restart(self) -> None:
        """Draw from the first number on again."""
        self._generators.clear()
