"""One call of a module that is made a second time: what it drew, its mode, its buffers and autocast are as in the first."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from slimgrad.errors import SlimgradError
from slimgrad.measuring.randomness import generators_on, noted_state, rewind
from slimgrad.measuring.second_run import SecondRun


class ReplayedCall:
    """``first`` makes the call and notes what it depended on; ``again`` makes it once more, under the caller's mode of gradients.

    Random states are kept only where the call drew. Buffers that the first call changed are not changed by the
    second. Raises SlimgradError where a parameter was changed between the two.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self._device = device
        self._second_run = SecondRun(module) if _is_watched(module) else None
        self._random: list[tuple[torch.Generator, bytes]] = []
        self._autocast: list[tuple[str, torch.dtype, bool]] = []
        self._training = [m.training for m in module.modules()]
        self._versions = [p._version for p in module.parameters()]

    def first(self, call: Callable[[], Tensor]) -> Tensor:
        """Make the call. What it returns is ``call``'s."""
        kinds = dict.fromkeys(("cpu", self._device.type))
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        generators = generators_on(self._device)
        before = [(generator, noted_state(generator)) for generator in generators]
        with self._autocast_as_first(), ExitStack() as stack:
            if self._second_run is not None:
                stack.enter_context(self._second_run.first_run(None))
                stack.enter_context(self._second_run.observing())
            result = call()
        self._random = [(g, state) for g, state in before if noted_state(g) != state]
        return result

    def again(self, call: Callable[[], Tensor]) -> Tensor:
        """Make the call once more."""
        if [p._version for p in self.module.parameters()] != self._versions:
            raise SlimgradError(
                f"a parameter of {type(self.module).__name__} was changed between forward and backward: what "
                "the forward pass was given cannot be reconstructed; update parameters after their gradient"
            )
        with ExitStack() as stack:
            stack.enter_context(self._drawing_as_first())
            stack.enter_context(self._modes_as_first())
            stack.enter_context(self._autocast_as_first())
            if self._second_run is not None:
                stack.enter_context(self._second_run.again())
            return call()

    @contextmanager
    def _autocast_as_first(self) -> Generator[None]:
        """No cache of weights: those cast where no gradient is recorded would be cut off from theirs."""
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
            yield

    @contextmanager
    def _drawing_as_first(self) -> Generator[None]:
        now = [(generator, noted_state(generator)) for generator, _ in self._random]
        try:
            for generator, state in self._random:
                rewind(generator, state)
            yield
        finally:
            for generator, state in now:
                rewind(generator, state)

    @contextmanager
    def _modes_as_first(self) -> Generator[None]:
        modules = list(self.module.modules())
        now = [m.training for m in modules]
        try:
            for module, training in zip(modules, self._training, strict=True):
                module.training = training
            yield
        finally:
            for module, training in zip(modules, now, strict=True):
                module.training = training


def _is_watched(module: nn.Module) -> bool:
    return any(
        m._buffers or (m is not module and (m._forward_hooks or m._forward_pre_hooks))
        for m in module.modules()
    )
