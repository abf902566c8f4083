"""What a block takes once compiled: measured on the real block, on the inputs that one real forward gives it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimgrad.errors import UnsupportedError
from slimgrad.host import LossFn
from slimgrad.measuring.buffers import Buffers
from slimgrad.measuring.compiled_code import compiled
from slimgrad.measuring.ledger import InsideCompiled
from slimgrad.measuring.randomness import RandomState, kept_randomness
from slimgrad.measuring.stopwatch import OtherData, in_turns, seconds_of
from slimgrad.measuring.tracker import plain_tensors
from slimgrad.method import CompiledCost


@dataclass(frozen=True)
class Inputs:
    """What a block was called with, and under which autocast. Tensors are copies, gradients asked for as they were."""

    args: Any
    kwargs: Any
    device: str
    autocast: tuple[bool, torch.dtype, bool]

    @staticmethod
    def now(args: Any, kwargs: Any, device: str) -> Inputs:
        """Copy the arguments of a call that is about to run."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        args, kwargs = tree_map_only(Tensor, copy, (args, kwargs))
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return Inputs(args, kwargs, device, (enabled, dtype, torch.is_autocast_cache_enabled()))

    def casting(self) -> AbstractContextManager[Any]:
        """The autocast of the call."""
        enabled, dtype, cache = self.autocast
        return torch.autocast(self.device, enabled=enabled, dtype=dtype, cache_enabled=cache)


class _Enough(Exception):  # noqa: N818
    """Every block that was waited for has been called."""


def captured_inputs(
    model: nn.Module, loss_fn: LossFn, batch: Any, paths: Sequence[str], device: str
) -> dict[str, Inputs]:
    """What each of these blocks is first called with in a real forward pass, in which nothing is kept for backward.

    The pass stops when all have been called. Buffers and random states are put back.
    """
    found: dict[str, Inputs] = {}
    handles: list[Any] = []

    def capture(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.setdefault(path, Inputs.now(args, kwargs, device))
            if len(found) == len(paths):
                raise _Enough

        return hook

    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(capture(path), with_kwargs=True))
    buffers = Buffers.of(model)
    none: Any = lambda _: None  # noqa: E731
    nothing_saved = torch.autograd.graph.saved_tensors_hooks(none, none)
    try:
        with kept_randomness(), torch.enable_grad(), nothing_saved:
            loss_fn(model, batch)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
        buffers.restore()
    return found


def compiled_cost(
    module: nn.Module, twin: nn.Module | None, inputs: Inputs, num_sharing: int
) -> CompiledCost:
    """Compile a block's forward, check its gradients, and measure it beside the plain one. Changes nothing.

    ``twin`` is another block that should share the compiled code. Raises ``UnsupportedError`` where gradients
    differ or the code is not shared, and what torch.compile raises.
    """
    fast = compiled(module)
    with _kept(module):
        begin = time.perf_counter()
        _run(module, fast, inputs)
        compile_s = time.perf_counter() - begin
    _check_values(module, fast, inputs)
    if twin is not None:
        _check_shared(twin, inputs)
    plain, made = _bytes(module, module.forward, inputs), _bytes(module, fast, inputs)
    seconds = _seconds(module, (module.forward, fast), inputs)
    return CompiledCost(
        saved_bytes=made.saved,
        forward_peak_bytes=made.forward_peak,
        backward_peak_bytes=made.backward_peak,
        forward_s=seconds[1][0],
        backward_s=seconds[1][1],
        plain_saved_bytes=plain.saved,
        plain_forward_s=seconds[0][0],
        plain_backward_s=seconds[0][1],
        compile_s=compile_s,
        num_sharing=num_sharing,
        holds_inputs=made.holds_inputs,
        holds_outputs=made.holds_outputs,
    )


@contextmanager
def _kept(module: nn.Module) -> Generator[None]:
    """The block's buffers and all random states as they were."""
    buffers = Buffers.of(module)
    try:
        with kept_randomness():
            yield
    finally:
        buffers.restore()


def _outputs(out: Any) -> list[Tensor]:
    inside = isinstance(out, (Tensor, tuple, list, dict))
    return plain_tensors(out if inside else getattr(out, "__dict__", out))


def _leaves(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    given = [t for t in plain_tensors((inputs.args, inputs.kwargs)) if t.requires_grad]
    return given + [p for p in module.parameters() if p.requires_grad]


def _weighted(outs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([(o * w).sum().float() for o, w in zip(outs, weights, strict=True)]).sum()


def _weights(outs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]


def _forward(forward: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    with torch.enable_grad(), inputs.casting():
        return [t for t in _outputs(forward(*inputs.args, **inputs.kwargs)) if t.requires_grad]


def _run(
    module: nn.Module, forward: Callable[..., Any], inputs: Inputs
) -> tuple[float, list[Tensor]]:
    """A scalar of the outputs, and its gradients by the inputs and the parameters."""
    outs = _forward(forward, inputs)
    if not outs:
        raise UnsupportedError("the block returns no tensor with a gradient")
    with torch.enable_grad():
        value = _weighted(outs, _weights(outs))
        leaves = _leaves(module, inputs)
        found: Any = torch.autograd.grad(value, leaves, allow_unused=True)
    return float(value.detach()), [
        torch.zeros_like(p) if g is None else g.detach() for g, p in zip(found, leaves, strict=True)
    ]


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))  # fmt: skip
    size = sum(float(b.double().square().sum()) for b in theirs)
    return (difference / size) ** 0.5 if size else float(difference > 0)


def _check_values(module: nn.Module, fast: Callable[..., Any], inputs: Inputs) -> None:
    """Gradients are those of the plain block; of a block that draws random numbers, those of its own values."""
    random = RandomState.now()
    with _kept(module):
        _, plain = _run(module, module.forward, inputs)
        draws = not RandomState.now().same_as(random)
    with _kept(module):
        _, ours = _run(module, fast, inputs)
    lowest = max((torch.finfo(g.dtype).eps for g in ours), default=0.0)
    if inputs.autocast[0]:
        lowest = max(lowest, torch.finfo(inputs.autocast[1]).eps)
    error, bound = _distance(ours, plain), 1e4 * lowest
    if draws:
        error, bound = _off_slope(module, fast, inputs, ours), 0.05
    if not error <= min(bound, 0.2):
        raise UnsupportedError(f"the compiled block's gradients are off by {error:.1e}")


def _off_slope(
    module: nn.Module,
    fast: Callable[..., Any],
    inputs: Inputs,
    gradients: Sequence[Tensor],
) -> float:
    """How far the gradient's square is from a central difference of the value along it, with the same draws."""
    leaves = _leaves(module, inputs)
    square = sum(float(g.double().square().sum()) for g in gradients)
    length = 2e-2 * sum(float(p.detach().double().square().sum()) for p in leaves) ** 0.5
    scale = length / max(square, 1e-30) ** 0.5

    def at(times: float) -> float:
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.add_(gradient, alpha=times)
        with _kept(module):
            outs = _forward(fast, inputs)
        return float(_weighted(outs, _weights(outs)).detach())

    kept = [leaf.detach().clone() for leaf in leaves]
    try:
        slope = (at(scale) - at(-2 * scale)) / (2 * scale)
    finally:
        with torch.no_grad():
            for leaf, before in zip(leaves, kept, strict=True):
                leaf.copy_(before)
    return abs(slope - square) / max(square, 1e-30)


def _check_shared(twin: nn.Module, inputs: Inputs) -> None:
    """The code made for one block runs another one like it."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    with _kept(twin):
        _forward(compiled(twin), inputs)
    if counters["stats"]["unique_graphs"] != before:
        raise UnsupportedError("blocks that look alike would each be compiled again")


@dataclass(frozen=True)
class _Bytes:
    saved: int
    forward_peak: int
    backward_peak: int
    holds_inputs: bool
    holds_outputs: bool


def _bytes(module: nn.Module, forward: Callable[..., Any], inputs: Inputs) -> _Bytes:
    """Run forward and backward under the ledger's tracker: what stays between them, and the most in each."""
    given = plain_tensors((inputs.args, inputs.kwargs))
    with _kept(module):
        weights = _weights([o.detach() for o in _forward(forward, inputs)])
    tracker = InsideCompiled(module, inputs=[*given, *weights], device=torch.device(inputs.device))
    began = [0]
    with _kept(module), tracker:
        base = tracker.peak_bytes = tracker.live_bytes
        outs = _forward(forward, inputs)
        forward_peak = tracker.peak_bytes - base
        known = {t.untyped_storage()._cdata for t in given}
        made = {s._cdata: s.nbytes() for s in (o.untyped_storage() for o in outs)}
        own = sum(nbytes for key, nbytes in made.items() if key not in known)
        saved = tracker.live_bytes - base - own
        kept = _saved_storages(outs)

        def begin(_: Tensor) -> None:
            began[0] = tracker.peak_bytes = tracker.live_bytes

        for out in outs:
            out.register_hook(begin)
        with torch.enable_grad():
            total = _weighted(outs, weights)
        del outs, out  # pyright: ignore[reportPossiblyUnboundVariable]
        gradients = torch.autograd.grad(total, _leaves(module, inputs), allow_unused=True)
        backward_peak = tracker.peak_bytes - began[0]
        del gradients
    return _Bytes(
        saved, forward_peak, backward_peak, bool(kept & known), bool(kept & (set(made) - known))
    )


def _saved_storages(outs: Sequence[Tensor]) -> set[int]:
    """The storages that compiled code's own nodes of the autograd graph keep."""
    found, met, nodes = set[int](), set[Any](), [o.grad_fn for o in outs]
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in met:
            continue
        met.add(node)
        saved = getattr(node, "saved_tensors", ())
        found |= {t.untyped_storage()._cdata for t in saved if isinstance(t, Tensor)}
        nodes += [following for following, _ in node.next_functions]
    return found


def _seconds(
    module: nn.Module, forwards: Sequence[Callable[..., Any]], inputs: Inputs
) -> list[tuple[float, float]]:
    """The least seconds of each forward pass and its backward, taken in turns."""
    leaves, others = _leaves(module, inputs), OtherData(inputs.device)

    def timed(forward: Callable[..., Any]) -> tuple[float, float]:
        with _kept(module):
            return _timed(forward, inputs, leaves, others)

    taken = in_turns([functools.partial(timed, forward) for forward in forwards])
    return [(min(t[0] for t in times), min(t[1] for t in times)) for times in taken]


def _timed(
    forward: Callable[..., Any], inputs: Inputs, leaves: list[Tensor], others: OtherData
) -> tuple[float, float]:
    """Seconds of a forward pass and of its backward, each on what is not in the cache."""
    outs: list[Tensor] = []
    others.use()
    forward_s = seconds_of(lambda: outs.extend(_forward(forward, inputs)), inputs.device)
    ones = [torch.ones_like(o) for o in outs]
    others.use()
    backward_s = seconds_of(
        lambda: torch.autograd.grad(outs, leaves, ones, allow_unused=True), inputs.device
    )
    return forward_s, backward_s
