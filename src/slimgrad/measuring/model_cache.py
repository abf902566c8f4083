"""Hugging Face's key-value cache: useless in training, and wrong under recomputation (it would grow twice).

It is off while a plan is applied, so steps that plans are made from are traced without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from slimgrad.method import Undo


def _caching_configs(model: nn.Module) -> Iterator[Any]:
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if config is None or id(config) in seen or getattr(config, "use_cache", None) is not True:
            continue
        seen.add(id(config))
        yield config


def has_cache(model: nn.Module) -> bool:
    """Whether ``switch_off_cache`` would change anything."""
    return any(True for _ in _caching_configs(model))


def switch_off_cache(model: nn.Module) -> Undo:
    """Set ``config.use_cache`` to False wherever the model has it; the undo sets it back."""
    undo = Undo()
    for config in list(_caching_configs(model)):
        config.use_cache = False
        undo.then(lambda config=config: setattr(config, "use_cache", True))
    return undo
