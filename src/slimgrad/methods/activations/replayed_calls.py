"""Calls that run without a graph first, and once more with one when the gradients of what they returned are known.

What gradient caching, deferred backpropagation and memory replay share. A call is repeated in the random state of its
first run, on the buffers that it saw then, and forward hooks that only look are not called again; afterwards random
states and buffers are what the first runs left. Modules that average gradients over processes (``no_sync``) do so in
the last repetition only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimgrad.batches import map_named, map_tensors, named_tensors
from slimgrad.errors import LossError
from slimgrad.measuring.randomness import NotedRandomness, kept_randomness
from slimgrad.measuring.second_run import SecondRun

Scale = Callable[[Tensor], Tensor]
"""What is done with a loss before its backward: ``GradScaler.scale``, or a division."""


class TwoRuns:
    """One call's run without a graph and the later one with it; ``before`` is the call of the same modules before it."""

    def __init__(self, modules: Sequence[nn.Module], before: TwoRuns | None = None) -> None:
        watched = nn.ModuleList(modules)
        self._second_run = SecondRun(watched)
        self.averaging = [m for m in watched.modules() if hasattr(m, "no_sync")]
        self._before = before
        self._random: NotedRandomness | None = None
        self._changing: set[str] | None = None

    @contextmanager
    def without_graph(self) -> Generator[None]:
        """The first run."""
        before, self._before = self._before, None
        self._random = NotedRandomness.now(before and before._random)
        changing = before and before._changing
        with torch.no_grad(), self._second_run.first_run(changing), self._second_run.observing():
            yield
        self._changing = {f"{id(m)}.{name}" for m, name, _ in self._second_run.changed}

    @contextmanager
    def with_graph(self, quiet: Sequence[Any]) -> Generator[None]:
        """The second run and its backward, or the only ones; those of ``averaging`` that are ``quiet`` do not average."""
        with ExitStack() as stack:
            if self._random is not None:
                stack.enter_context(kept_randomness())
                stack.enter_context(self._second_run.again())
                self._random.restore()
            for module in quiet:
                stack.enter_context(module.no_sync())
            stack.enter_context(torch.enable_grad())
            yield
        torch.clear_autocast_cache()  # of weights cast within a graph that is gone


@dataclass(frozen=True)
class Call:
    """``function()`` returns a tensor or a nest of them; ``modules`` are those that it runs."""

    function: Callable[[], Any]
    modules: tuple[nn.Module, ...]


def backward_by_replay(
    calls: Sequence[Call], loss_of: Callable[[list[Any]], Tensor], scale: Scale | None = None
) -> Tensor:
    """The loss of what all ``calls`` return, and its backward with the graph of one call in memory at a time.

    Gradients are added to ``.grad``, those of parameters inside ``loss_of`` too; the loss comes back detached.
    """
    runs, outputs = _first_runs(calls)
    torch.clear_autocast_cache()  # weights cast without a graph would get no gradient
    with torch.enable_grad():
        loss = loss_of(outputs)
        backward_from(loss, {}, {}, scale)
    loss = loss.detach()  # its graph would keep the outputs
    gradients = [gradients_of(output) for output in outputs]
    outputs.clear()
    wanted = [i for i, found in enumerate(gradients) if found]
    last = {module: i for i in wanted for module in runs[i].averaging}
    for i in wanted:
        with runs[i].with_graph([m for m in runs[i].averaging if last[m] != i]):
            backward_from(None, named_tensors(calls[i].function()), gradients[i])
        gradients[i] = {}
    return loss


def _first_runs(calls: Sequence[Call]) -> tuple[list[TwoRuns], list[Any]]:
    """The runs without a graph, and what each returned, as leaves."""
    runs: list[TwoRuns] = []
    outputs: list[Any] = []
    latest: dict[tuple[nn.Module, ...], TwoRuns] = {}
    for call in calls:
        run = latest[call.modules] = TwoRuns(call.modules, latest.get(call.modules))
        with run.without_graph():
            outputs.append(as_leaves(call.function()))
        runs.append(run)
    return runs, outputs


def backward_from(
    loss: Tensor | None,
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
    scale: Scale | None = None,
) -> None:
    """One backward pass from ``loss`` and from those of ``outputs`` whose ``gradients`` are known."""
    roots = [outputs[path] for path in gradients if outputs[path].requires_grad]
    known: list[Tensor | None] = [g for path, g in gradients.items() if outputs[path].requires_grad]
    if loss is not None:
        roots.append(_checked(loss) if scale is None else scale(_checked(loss)))
        known.append(None)
    if roots:
        torch.autograd.backward(roots, known)


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        found = (
            f"a tensor of shape {list(loss.shape)}{'' if loss.requires_grad else ' without a gradient'}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise LossError(
            f"expected loss_fn to return a scalar tensor with a gradient, found {found}"
        )
    return loss


def as_leaves(nest: Any) -> Any:
    """``nest`` with every tensor cut off from what made it; gradients are collected on those that can have one."""
    return map_tensors(_leaf, nest)


def _leaf(tensor: Tensor) -> Tensor:
    can_have_one = tensor.is_floating_point() or tensor.is_complex()
    return tensor.detach().requires_grad_(can_have_one)


def gradients_of(leaves: Any) -> dict[str, Tensor]:
    """What was collected on ``as_leaves``, by path."""
    return {p: t.grad for p, t in named_tensors(leaves).items() if t.grad is not None}


class CutOff:
    """Inputs that have a graph of their own, cut off from it: it is run backward once, at the end."""

    def __init__(self, inputs: Any) -> None:
        self._inputs = named_tensors(inputs)
        self.leaves = map_tensors(lambda t: _leaf(t) if t.requires_grad else t, inputs)

    def give_back(self) -> None:
        """Pass on the gradients that came together on the leaves."""
        backward_from(None, self._inputs, gradients_of(self.leaves))


def joined(parts: Sequence[Any]) -> Any:
    """The tensors of ``parts``, which are nests of one form, one behind the other along their first dimension."""
    if len(parts) == 1:
        return parts[0]
    by_path = [named_tensors(part) for part in parts]
    return map_named(lambda path, _: torch.cat([found[path] for found in by_path]), parts[0])


def modules_of(function: Any) -> tuple[nn.Module, ...]:
    """The module that ``function`` is, or that it is a method of."""
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    return (owner,) if isinstance(owner, nn.Module) else ()
