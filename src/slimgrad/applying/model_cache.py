"""Hugging Face's key-value cache: useless in training, and wrong under recomputation (it would grow twice)."""

from __future__ import annotations

from typing import Any

from torch import nn

from slimgrad.method import Undo


def switch_off_cache(model: nn.Module) -> Undo:
    """Set ``config.use_cache`` to False wherever the model has it; the undo sets it back."""
    undo = Undo()
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is None or id(config) in seen or getattr(config, "use_cache", None) is not True:
            continue
        seen.add(id(config))
        config.use_cache = False
        undo.then(lambda config=config: setattr(config, "use_cache", True))
    return undo
