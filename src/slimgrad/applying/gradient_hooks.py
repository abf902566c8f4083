"""Hooks on parameters that tell the host when a gradient is complete."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slimgrad.host import Host
from slimgrad.method import Undo


def watch_gradients(host: Host) -> Undo:
    """Call ``host.on_gradient`` as each parameter's gradient completes in the last share of a step."""
    hooked: dict[int, Any] = {}

    def complete(parameter: Tensor) -> None:
        if host.in_last_share and host.on_gradient is not None:
            host.gradient_order.append(parameter)
            host.on_gradient(parameter)

    for parameter in host.parameters():
        if parameter.requires_grad and id(parameter) not in hooked:
            hooked[id(parameter)] = parameter.register_post_accumulate_grad_hook(complete)
    return Undo(*(handle.remove for handle in hooked.values()))
