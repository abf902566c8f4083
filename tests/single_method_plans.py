"""Plans of one method alone, on the whole step or on every block, and what the replay predicts for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer

from slimgrad import catalogue
from slimgrad.host import Host, LossFn
from slimgrad.measuring.blocks import cut
from slimgrad.measuring.profile import Profile, fingerprint
from slimgrad.method import (
    Block,
    Method,
    Offer,
    Record,
    Refusal,
    Rewriting,
    Scope,
    hyperparameters,
    method_name,
)
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.plan import Choice, Plan
from slimgrad.planning.real_passes import setting_of
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.planning.solve import Programme
from slimgrad.types import Exactness

SMALL = {"min_bytes": 1024, "slice_bytes": 4096}  # defaults are for models of a real size


def settings_of(name: str, host: Host, batch: Any) -> Sequence[Method] | Refusal:
    """The settings of a method to test: its own for one that rewrites the step, else one made for small models."""
    cls = catalogue.methods()[name]
    if isinstance(cls, Rewriting):
        found = cls.settings(host, batch)
        return found if isinstance(found, Refusal) else [found[0], found[-1]][: len(found)]
    return [cls(**{f.name: SMALL[f.name] for f in fields(cls) if f.name in SMALL})]


def hand_made(
    model: nn.Module, optimizer: Optimizer | None, method: Method, paths: Sequence[str] = ()
) -> Plan:
    """The plan with ``method`` alone: on the whole step, or on each of ``paths``."""
    on = [""] if method.scope is Scope.MODEL else paths
    choices = [Choice(p, method_name(method), dict(hyperparameters(method))) for p in on]
    return plan_of(model, optimizer, choices)


def plan_of(model: nn.Module, optimizer: Optimizer | None, choices: Sequence[Choice]) -> Plan:
    """A plan with these choices and no predictions."""
    return Plan(
        fingerprint=fingerprint(model, optimizer),
        budget="min",
        budget_bytes=0,
        exactness=Exactness.DIFFERENT,
        plain_peak_bytes=0,
        plain_seconds=0.0,
        peak_bytes=0,
        seconds=0.0,
        choices=tuple(choices),
        columns={},
        refusals={},
    )


def scheme_of(profile: Profile, method: Method | None = None) -> Scheme | Refusal:
    """The whole step with ``method`` of scope ``model`` (None: with nothing)."""
    if method is None:
        return Scheme(
            (),
            (),
            model_record(profile, 1, None),
            profile.variants[()],
        )
    variant = (setting_of(method),) if isinstance(type(method), Rewriting) else ()
    record = model_record(profile, getattr(method, "num", 1), None)
    offer = method.offer(Block("", Scope.MODEL, record))
    if isinstance(offer, Refusal):
        return offer
    return Scheme(variant, ((method, offer.note),), offer.record, profile.variants[variant])


def programme_of(profile: Profile, scheme: Scheme, chosen: dict[str, Method]) -> Programme:
    """The programme whose only options are ``chosen``, block path to method; blocks that refuse are left out."""
    layout = layout_of(profile, scheme.trace)
    found: list[Option] = []
    for path, method in chosen.items():
        if path not in layout.blocks:
            continue
        record = block_record(profile, layout, layout.blocks[path], model=scheme.record)
        offer = method.offer(Block(path, Scope.BLOCK, record))
        if isinstance(offer, Refusal):
            assert offer.reason
        else:
            assert isinstance(offer, Offer)
            assert isinstance(offer.record, Record)
            added = (offer.record.seconds - record.seconds) * scheme.repeats
            found.append(Option(path, (method,), offer.record, offer.note, added))
    return Programme(scheme, Menu(layout, found))


def predicted_peak(programme: Programme) -> int:
    """The replayed peak with every option of the programme chosen."""
    return int(programme.replay(np.ones(len(programme.menu.options)))[0].max())


def measured_peak(step: Any, batch: Any) -> int:
    """The ledger's peak of the second step: the first makes the optimizer's state."""
    step(batch)
    with step.ledger(batch) as ledger:
        step(batch)
    return ledger.peak_bytes


def block_paths(model: nn.Module) -> list[str]:
    """The blocks of a model."""
    return cut(model)


def host_of(model: nn.Module, optimizer: Optimizer | None, loss_fn: LossFn) -> Host:
    """What a method is attached to."""
    return Host(model, optimizer, loss_fn)
