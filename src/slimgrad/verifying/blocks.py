"""Where a plain step does not fit: each planned block against the plain one, one at a time; then the whole
gradient against a finite difference of the loss along it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from slimgrad import catalogue
from slimgrad.applying.step import Step
from slimgrad.measuring.buffers import Buffers
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.tracker import plain_tensors
from slimgrad.types import Exactness
from slimgrad.verifying.gradient import (
    captured_gradients,
    relative_error,
    same_bits,
    without_dropout,
)
from slimgrad.verifying.report import Report
from slimgrad.verifying.snapshot import Snapshot

_FINITE_DIFFERENCE = 0.05  # of the slope, by which curvature and rounding may put it off
_CODED = 0.5  # of one block's gradients, under codes; the plan bounds that of the whole
_BEYOND = 1.5  # times the bound, that a control leaves out
_LOSS_CHANGE = 2e-3  # share of the loss by which the finite difference moves it: far above rounding


def compare_blocks(step: Step, batch: Any, report: Report) -> None:
    """Fill ``report`` from blocks compared by value, as their rungs promise, and a directional finite difference."""
    rungs = _rungs(step)
    exact = [p for p, rung in rungs.items() if rung is Exactness.BITWISE]
    rounded = [p for p, rung in rungs.items() if rung is Exactness.EXACT]
    coded = [p for p in rungs if p not in exact and p not in rounded]
    differing = _compare_each(step, batch, exact, same_bits)
    differing += _compare_each(step, batch, coded, _same_but_gradients)
    if rounded:
        with without_dropout(step.host.model):  # compiled code draws other masks
            differing += _compare_each(step, batch, rounded, _same_but_rounding)
    report.checks["blocks"] = not differing
    if differing:
        report.notes.append("differ from plain: " + ", ".join(differing[:5]))
    bound = _FINITE_DIFFERENCE + ((step.plan.error or 0.0) if coded else 0.0)
    error, control = _along_gradient(step, batch, bound)
    report.gradient_error = error
    report.checks |= {"gradient": error < bound, "control": control >= bound}
    report.control_failed = control >= bound
    how = f"{len(rounded)} of them, compiled, up to rounding"
    if coded:
        how += f", and the gradients of {len(coded)}, kept as codes, within {_CODED:.0%}"
    report.notes.append(
        f"plain training does not fit here: {len(rungs)} blocks were compared one at a time, bit for bit "
        f"({how}), and the gradient with a finite difference of the loss along it"
    )


def _rungs(step: Step) -> dict[str, Exactness]:
    """For each block, the loosest rung of the methods on it."""
    found: dict[str, Exactness] = {}
    for choice in step.plan.choices:
        if choice.path:
            rung = catalogue.get(choice.method).exactness
            found[choice.path] = max(found.get(choice.path, rung), rung, key=lambda r: r.rung)
    return found


def _same_but_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether outputs and buffers have the same bits, and gradients are nearer than one left out would be."""

    def split(found: dict[str, Tensor], *, gradients: bool) -> dict[str, Tensor]:
        return {n: t for n, t in found.items() if n.startswith("grad") is gradients}

    kept = same_bits(split(ours, gradients=False), split(theirs, gradients=False))
    error = relative_error(split(ours, gradients=True), split(theirs, gradients=True))
    return kept and error <= _CODED


def _same_but_rounding(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    floating = [t.dtype for t in theirs.values() if t.is_floating_point()]
    precision = max((torch.finfo(dtype).eps for dtype in floating), default=0.0)
    return relative_error(ours, theirs) <= 1e3 * precision


def _compare_each(
    step: Step, batch: Any, paths: list[str], same: Callable[[Any, Any], bool]
) -> list[str]:
    model, differing, handles = step.host.model, list[str](), list[Any]()
    busy = [False]

    def check(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if busy[0]:
                return
            busy[0] = True
            try:
                if not same(*_both(module, args, kwargs)):
                    differing.append(path)
            finally:
                busy[0] = False

        return hook

    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(check(path), with_kwargs=True))
    random = RandomState.now()
    buffers = Buffers.of(model)
    try:
        with torch.no_grad():
            for share in step.host.split(batch):
                step.host.loss_fn(model, share.batch)
    finally:
        for handle in handles:
            handle.remove()
        random.restore()
        buffers.restore()
    return differing


def _both(module: nn.Module, args: Any, kwargs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the block gives as planned, and as it is plain."""
    plain = type(module).forward.__get__(module)
    planned = module.__dict__.get("forward", plain)
    buffers = Buffers.of(module)
    random = RandomState.now()
    with_plan = _run_block(module, planned, args, kwargs, random, buffers)
    without = _run_block(module, plain, args, kwargs, random, buffers)
    random.restore()
    return with_plan, without


def _run_block(
    module: nn.Module,
    forward: Any,
    args: Any,
    kwargs: Any,
    random: RandomState,
    buffers: Buffers,
) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of one block, by name, for a fixed cotangent."""
    random.restore()

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_() if t.is_floating_point() else t

    inputs = tree_map_only(Tensor, leaf, (args, kwargs))
    kept = {n: p.grad for n, p in module.named_parameters()}
    with torch.enable_grad():
        out = forward(*inputs[0], **inputs[1])
        outs = [t for t in plain_tensors(out) if t.requires_grad]
        generator = torch.Generator(device="cpu").manual_seed(0)
        cotangents = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in outs]
        leaves = [t for t in plain_tensors(inputs) if t.requires_grad]
        weights = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(outs, leaves + weights, cotangents, allow_unused=True)
    result: dict[str, Tensor] = {}
    for i, gradient in enumerate(found):
        if gradient is not None:  # pyright: ignore[reportUnnecessaryComparison]: None where unused
            result[f"grad{i}"] = gradient.detach()
    result |= {f"out{i}": t.detach() for i, t in enumerate(outs)}
    result |= {f"buffer.{n}": b.detach().clone() for n, b in module.named_buffers()}
    buffers.restore()
    for name, parameter in module.named_parameters():
        parameter.grad = kept[name]
    return result


def _along_gradient(step: Step, batch: Any, bound: float) -> tuple[float, float]:
    """| <g, v> - dL/dv | / |dL/dv| for v along g, and the same with gradients dropped from <g, v>, more than ``bound``."""
    host = step.host
    with step.suspended():
        snapshot = Snapshot(host.model, host.optimizer)
    gradients: dict[str, Tensor] = {}
    with without_dropout(host.model), captured_gradients(host.model, gradients):
        loss = float(step(batch))
    with step.suspended():
        snapshot.restore()
    norms = {n: float(g.double().square().sum()) for n, g in gradients.items()}
    total = sum(norms.values())
    weights = dict(host.model.named_parameters())
    epsilon = _LOSS_CHANGE * max(abs(loss), 1e-6) / max(total, 1e-30)
    random, buffers = RandomState.now(), Buffers.of(host.model)

    def loss_at(scale: float) -> float:
        random.restore()
        buffers.restore()
        with torch.no_grad(), without_dropout(host.model):
            for name, gradient in gradients.items():
                weights[name].add_(gradient, alpha=scale)
            return sum(
                float(host.loss_fn(host.model, s.batch)) * s.weight for s in host.split(batch)
            )

    up = loss_at(epsilon)
    down = loss_at(-2 * epsilon)
    with step.suspended():
        snapshot.restore()
    slope = (up - down) / (2 * epsilon)
    without = min(total - max(norms.values(), default=0.0), (1 - _BEYOND * bound) * total)
    scale = max(abs(slope), 1e-12)
    return abs(total - slope) / scale, abs(without - slope) / scale
