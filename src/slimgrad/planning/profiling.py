"""``measure``: one step of the user's, and one for each rewriting method's settings, turned into a Profile."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from slimgrad.batches import batch_shapes, batch_size, check_batch
from slimgrad.errors import ModelError, UnsupportedError
from slimgrad.host import Host, LossFn
from slimgrad.layers.compaction import compaction_of
from slimgrad.measuring.blocks import cut, cut_large
from slimgrad.measuring.clock import OpKey, Rates, time_operations
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.optimizer import OptimizerLaw, no_optimizer, optimizer_law
from slimgrad.measuring.profile import ModuleCost, Profile, Setting, fingerprint, versions
from slimgrad.measuring.trace import Trace
from slimgrad.measuring.tracker import device_of
from slimgrad.methods.gradients.micro_batches import has_batch_statistics
from slimgrad.planning.arguments import check_arguments
from slimgrad.planning.calls import call_bytes
from slimgrad.planning.compiled_variants import Asked, compiled_variants
from slimgrad.planning.compiling import check_steps, compiled_costs
from slimgrad.planning.real_passes import setting_of, time_passes
from slimgrad.planning.sensitivity import coding_costs, gradient_noise
from slimgrad.planning.settings import plain_record
from slimgrad.planning.simulate import Layout
from slimgrad.planning.variants import traced, variants
from slimgrad.storage import measure_bandwidth, open_store
from slimgrad.types import Column


def measure(
    model: nn.Module,
    optimizer: Optimizer | None,
    loss_fn: LossFn,
    batch: Any,
    *,
    limit_bytes: int | None = None,
    limit_s: float = 20.0,
    allow_compile: bool | None = None,
    steps: int | None = None,
    compile_limit_s: float = 120.0,
    sensitivity: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Measure where the memory and the time of one training step go. Changes nothing.

    Bytes come from fake tensors: nothing is allocated for them. Seconds come from single operations run for
    real, none of which takes more than ``limit_bytes`` (default: unlimited) nor all of them much more than
    ``limit_s`` seconds; where the plain step fits into that and into half of the free memory, whole passes are run
    for about as long again, and scale them. ``optimizer=None`` measures a forward and backward pass alone.

    With ``allow_compile`` the whole step is compiled too and run beside the plain one, then one block of each set of
    equal ones (10-40 s each) on what one real forward pass gives it; no more are begun after ``compile_limit_s``
    seconds, nor what is expected to take longer. None: where a C++ compiler is found and a run of ``steps`` (None:
    1000) is long enough to pay for it. A whole step that does not fit into ``limit_bytes`` is not compiled.

    With ``sensitivity`` it is measured what each code of saved tensors does to the gradient, block by block (a real
    forward and backward pass for each code on up to three blocks of a kind and on all at once): plans of rung
    ``unbiased`` or ``approximate`` need it. ``progress`` is told what is being tried.

    Raises ``BatchError``, ``ModelError``, ``LossError`` or ``UnsupportedError`` for input that cannot be
    trained on.
    """
    check_arguments(model, optimizer, loss_fn)
    check_model(model, optimizer)
    check_batch(batch, device_of(model))
    names = {id(p): name for name, p in model.named_parameters()}
    host = Host(model, optimizer, loss_fn)
    keys: dict[OpKey, int] = {}
    paths, plain = _cut_and_traced(host, batch, keys)
    refusals: dict[str, str] = {}
    traces = variants(host, batch, plain, paths, keys, refusals)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    law = no_optimizer(trainable) if optimizer is None else optimizer_law(optimizer, names)
    rates = _time(host, batch, plain, traces, keys, limit_bytes, limit_s)
    asked = Asked(allow_compile, check_steps(steps), compile_limit_s, limit_bytes)
    whole = compiled_variants(host, batch, traces[()], list(keys), asked)
    refusals |= whole.refusals
    costs, reason = compiled_costs(
        host, batch, traces[()], asked.allow, asked.steps, compile_limit_s - whole.spent_s
    )
    if reason is not None:
        refusals["compiled"] = reason
    traces |= {(setting_of(method),): trace for method, trace in whole.traces.items()}
    profile = _profile(host, batch, plain, traces, law, rates, refusals)
    profile = replace(profile, compiled=costs, compile_s=whole.compile_s)
    return _with_coding(host, batch, profile, progress) if sensitivity else profile


def _time(
    host: Host,
    batch: Any,
    plain: Trace,
    traces: dict[tuple[Setting, ...], Trace],
    keys: dict[OpKey, int],
    limit_bytes: int | None,
    limit_s: float,
) -> Rates:
    """Give each traced operation its seconds: timed alone, and scaled to real passes where those fit."""
    seconds, rates = time_operations(list(keys), limit_bytes=limit_bytes, limit_s=limit_s)
    for trace in (plain, *traces.values()):
        trace.op_seconds = seconds[trace.op]
    undo = switch_off_cache(host.model)
    try:
        time_passes(host, batch, traces, limit_bytes=limit_bytes, limit_s=limit_s)
    finally:
        undo()
    if traces[()] is not plain and traces[()].is_timed:
        plain.op_seconds *= traces[()].op_seconds.sum() / max(seconds[traces[()].op].sum(), 1e-12)
    return rates


def _with_coding(
    host: Host, batch: Any, profile: Profile, progress: Callable[[str], None]
) -> Profile:
    undo = switch_off_cache(host.model)
    try:
        costs = coding_costs(host, batch, profile, progress)
        noise = gradient_noise(host, batch, list(costs))
        return replace(profile, coding=costs, gradient_noise=noise)
    finally:
        undo()


def check_model(model: nn.Module, optimizer: Optimizer | None) -> None:
    """Raise ``ModelError`` for a model in which nothing is trained, or an optimizer of another model.

    Raises ``UnsupportedError`` where gradients are not what methods know as such: sparse, or beside their parameters.
    """
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    if not trainable:
        raise ModelError(
            "no parameter of the model requires a gradient: unfreeze some with requires_grad_(True)"
        )
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise UnsupportedError(
                f"the gradient of {path or type(module).__name__!r} is a sparse tensor, which plans do not follow: make it "
                "with sparse=False"
            )
    if any(compaction_of(p) is not None for p in model.parameters()):
        raise UnsupportedError(
            "weights of compact() keep small gradients beside themselves, which plans do not follow: train this model in a "
            "loop of your own, or plan without compact()"
        )
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not held & trainable:
        raise ModelError(
            "the optimizer holds no trainable parameter of this model: build it from model.parameters() "
            "(after moving or converting the model)"
        )


def _cut_and_traced(host: Host, batch: Any, keys: dict[OpKey, int]) -> tuple[list[str], Trace]:
    """The plain step's trace with blocks of comparable size: what is large is cut again and traced again."""
    paths = cut(host.model)
    while True:
        trace = traced(host, batch, paths, keys)
        blocks = Layout(trace, no_optimizer([]), 0).blocks
        saved = {p: sum(call_bytes(trace, s) for s in b.saved.values()) for p, b in blocks.items()}
        finer = cut_large(host.model, paths, saved)
        if finer == paths:
            return paths, trace
        paths = finer


def _profile(
    host: Host,
    batch: Any,
    plain: Trace,
    traces: dict[tuple[Setting, ...], Trace],
    law: OptimizerLaw,
    rates: Any,
    refusals: dict[str, str],
) -> Profile:
    model = host.model
    weights = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    read, write = _bandwidth(host)
    layout = Layout(plain, law, law.state_bytes)
    timeline = layout.timeline(layout.model_changes(plain_record(law)))
    backward = plain.op_backward
    return Profile(
        fingerprint=fingerprint(model, host.optimizer),
        device=str(host.device),
        batch_size=batch_size(batch),
        weight_bytes=sum(weights.values()),
        trainable_bytes=sum(p.nbytes for p in law.parameters),
        variants=traces,
        law=law,
        rates=rates,
        modules=module_costs(model, layout),
        refusals=refusals,
        has_batch_statistics=has_batch_statistics(model),
        has_dropout=_has_dropout(model),
        read_bytes_s=read,
        write_bytes_s=write,
        plain_timeline=timeline,
        forward_s=float(plain.op_seconds[~backward].sum()),
        backward_s=float(plain.op_seconds[backward].sum()),
        update_s=law.seconds_per_element * sum(int(np.prod(p.shape)) for p in law.parameters),
        versions=versions(),
        batch_shapes=batch_shapes(batch),
    )


def _bandwidth(host: Host) -> tuple[float, float]:
    if any(is_fake(p) for p in host.model.parameters()):
        return 1e9, 1e9
    with tempfile.TemporaryDirectory(prefix="slimgrad-") as folder:
        store = open_store(host.device, Path(folder))
        try:
            return measure_bandwidth(store)
        finally:
            store.close()


def _has_dropout(model: nn.Module) -> bool:
    dropouts = (nn.modules.dropout._DropoutNd,)
    by_module = any(isinstance(m, dropouts) and m.p > 0 and m.training for m in model.modules())
    return by_module or any(
        getattr(m, "dropout", 0.0) for m in model.modules() if isinstance(m, nn.RNNBase)
    )


def module_costs(model: nn.Module, layout: Layout) -> list[ModuleCost]:
    """One row a block, and one for all that is outside blocks."""
    trace, rows = layout.trace, list[ModuleCost]()
    for path, block in layout.blocks.items():
        module = model.get_submodule(path)
        rows.append(
            ModuleCost(
                path,
                type(module).__name__,
                sum(p.numel() * p.element_size() for p in module.parameters()),
                sum(call_bytes(trace, s) for s in block.saved.values()),
                layout.seconds(block.calls, backward=False),
                layout.seconds(block.calls, backward=True),
            )
        )
    activations = trace.timeline().columns[Column.ACTIVATIONS]
    outside = max(0, int(max(activations)) - sum(r.activation_bytes for r in rows))
    loose = trace.op_call < 0
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    inside = sum(r.weight_bytes for r in rows)
    rows.append(
        ModuleCost(
            "(outside blocks)",
            type(model).__name__,
            max(0, sum(held.values()) - inside),
            outside,
            float(trace.op_seconds[loose & ~trace.op_backward].sum()),
            float(trace.op_seconds[loose & trace.op_backward].sum()),
        )
    )
    return rows
