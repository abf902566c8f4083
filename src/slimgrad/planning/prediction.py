"""What a plan's step would take on a batch of other shapes than it was made for: one trace, replayed under its choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from slimgrad import catalogue
from slimgrad.batches import Shapes, batch_shapes, batch_size, named_tensors
from slimgrad.errors import PlanError
from slimgrad.host import Batch, Host, Share
from slimgrad.measuring.blocks import cut
from slimgrad.measuring.clock import Rates
from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.optimizer import no_optimizer, optimizer_law
from slimgrad.measuring.profile import Profile, Setting, fingerprint
from slimgrad.measuring.trace import trace_step
from slimgrad.method import Block, Method, ModelRecord, Offer, Record, Refusal, Rewriting, Scope
from slimgrad.methods.gradients.micro_batches import has_batch_statistics
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Option, Scheme, attach_order
from slimgrad.planning.plan import Choice, Plan
from slimgrad.planning.real_passes import setting_of
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import Programme
from slimgrad.types import Column


def predicted_peak(plan: Plan, profile: Profile) -> int:
    """The peak, in bytes, of a step under ``plan`` on a batch like the one that ``profile`` was measured with.

    Nothing is run: the profile's trace is replayed under the plan's choices. A block whose method says nothing
    of the new shape is counted as plain. Raises ``PlanError`` where the profile was measured for another model,
    or without the plan's methods that rewrite the step.

    >>> import torch, slimgrad
    >>> model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
    >>> sgd, loss_fn = torch.optim.SGD(model.parameters()), lambda model, x: model(x).sum()
    >>> short, long = (slimgrad.measure(model, sgd, loss_fn, torch.ones(n, 32)) for n in (64, 128))
    >>> made = slimgrad.plan(short, "100%", exactness="bitwise")
    >>> predicted_peak(made, short) == made.peak_bytes < predicted_peak(made, long)
    True
    """
    if profile.fingerprint != plan.fingerprint:
        raise PlanError(
            f"the profile is of a model and optimizer with fingerprint {profile.fingerprint}, the plan is for "
            f"{plan.fingerprint}: measure the plan's own model"
        )
    methods = [catalogue.get(c.method, **c.fields) for c in plan.choices if not c.path]
    scheme = _scheme(plan, profile, sorted(methods, key=attach_order))
    layout = layout_of(profile, scheme.trace)
    chosen = _options(plan, profile, layout, scheme.record)
    live, _ = Programme(scheme, Menu(layout, chosen)).replay(np.ones(len(chosen)))
    return int(live.max())


def _scheme(plan: Plan, profile: Profile, methods: Sequence[Method]) -> Scheme:
    wanted = [setting_of(m) for m in methods if isinstance(type(m), Rewriting)]
    variant = next((v for v in profile.variants if _same_settings(v, wanted)), None)
    if variant is None:
        names = ", ".join(name for name, _ in wanted)
        raise PlanError(
            f"the profile was not measured with {names} as the plan has it, so the plan cannot be replayed on it"
        )
    parts = max((getattr(m, "num", 1) for m in methods), default=1)
    record = model_record(profile, parts, plan.clip_grad_norm, plan.num_steps)
    for method in methods:
        offer = method.offer(Block("", Scope.MODEL, record))
        if isinstance(offer, Refusal):
            raise PlanError(f"{setting_of(method)[0]} is refused on this profile: {offer.reason}")
        assert isinstance(offer.record, ModelRecord)
        record = offer.record
    return Scheme(variant, tuple((m, "") for m in methods), record, profile.variants[variant])


def _same_settings(variant: Sequence[Setting], wanted: Sequence[Setting]) -> bool:
    return len(variant) == len(wanted) and all(setting in variant for setting in wanted)


def _options(plan: Plan, profile: Profile, layout: Layout, model: ModelRecord) -> list[Option]:
    """What the plan's methods make of each block as it is in this profile."""
    by_blocks: dict[tuple[str, ...], list[Choice]] = {}
    for choice in plan.choices:
        if choice.path and set(choice.blocks) <= layout.blocks.keys():
            by_blocks.setdefault(choice.blocks, []).append(choice)
    found: list[Option] = []
    for blocks, choices in by_blocks.items():
        is_run = len(blocks) > 1
        block = layout.block(blocks if is_run else choices[0].path)
        record = block_record(profile, layout, block, model=model, num_steps=plan.num_steps)
        methods: list[Method] = []
        for choice in choices:
            method = catalogue.get(choice.method, **choice.fields)
            asked = Block(choice.path, method.scope, record, paths=blocks if is_run else ())
            offer = method.offer(asked)
            if isinstance(offer, Offer) and isinstance(offer.record, Record):
                record = offer.record
                methods.append(method)
        if methods:
            paths = blocks if is_run else ()
            found.append(Option(choices[0].path, tuple(methods), record, "", 0.0, paths))
    return found


def bare_profile(host: Host, plan: Plan) -> Profile:
    """What of a profile does not depend on the batch, for a plan applied without the one it was made from.

    It holds no trace: ``at_batch`` adds one. Nothing is timed.
    """
    model, optimizer = host.model, host.optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    law = no_optimizer(trainable) if optimizer is None else optimizer_law(optimizer, names)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return Profile(
        fingerprint=fingerprint(model, optimizer),
        device=str(host.device),
        batch_size=0,
        weight_bytes=sum(t.numel() * t.element_size() for t in tensors),
        trainable_bytes=sum(p.nbytes for p in law.parameters),
        variants={},
        law=law,
        rates=Rates(),
        modules=[],
        refusals={},
        has_batch_statistics=has_batch_statistics(model),
        has_dropout=False,
        read_bytes_s=1e9,
        write_bytes_s=1e9,
        plain_timeline=MemoryTimeline(dict.fromkeys(Column, np.zeros(1, dtype=np.int64))),
        forward_s=0.0,
        backward_s=0.0,
        update_s=0.0,
    )


def block_paths(model: nn.Module, plan: Plan, profile: Profile) -> list[str]:
    """The blocks that the plan was made from: those measured, else those cut and those that it names."""
    measured = [row.path for row in profile.modules]
    known = [path for path, _ in model.named_modules() if path and path in measured]
    chosen = [path for c in plan.choices if c.path for path in c.blocks]
    if known or not chosen:
        return known or cut(model)
    outer = [p for p in cut(model) if not any(c == p or c.startswith(f"{p}.") for c in chosen)]
    return [*dict.fromkeys(chosen), *outer]


def at_batch(
    profile: Profile, host: Host, batch: Batch, paths: Sequence[str], settings: Sequence[Setting]
) -> Profile:
    """``profile`` with one trace, of ``batch``, on fake tensors; ``settings`` are those of what is attached.

    At most three of the parts that ``host.split`` makes are traced, the largest among them. Seconds are not
    measured. Raises what loss_fn raises on fake tensors.
    """
    shares = _telling(list(host.split(batch)))
    trace = trace_step(host.model, host.loss_fn, shares, paths, {})
    trace.op_seconds = np.zeros(len(trace.op))
    return replace(
        profile,
        variants={tuple(settings): trace},
        batch_size=batch_size(batch),
        batch_shapes=batch_shapes(batch),
    )


def _telling(shares: list[Share]) -> list[Share]:
    """The first two and the largest of the others: a peak is reached in the largest, later ones add gradients."""
    if len(shares) <= 3:
        return shares
    return [*shares[:2], max(shares[2:], key=_num_elements)]


def _num_elements(share: Share) -> int:
    return sum(t.numel() for t in named_tensors(share.batch).values())


def changed_dimensions(found: Shapes, planned: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """Where ``found`` is longer than planned, for a reader: ``input_ids [2, 900], planned [2, 512]``."""
    told: list[str] = []
    for path, (dtype, shape) in found.items():
        most_dtype, most = planned.get(path, ("", ()))
        if (dtype, shape) != (most_dtype, most):
            before = f"planned {list(most)}" if path in planned else "not planned for"
            kind = (
                f" {dtype}, planned {most_dtype}" if path in planned and dtype != most_dtype else ""
            )
            told.append(f"{path or 'the batch'} {list(shape)}{kind}, {before}")
    gone = [path for path in planned if path not in found]
    return "; ".join([*told, *(f"{path} is missing" for path in gone)])
