"""Codes on every block of a sample model: which suit, as records, as plans and attached."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from tests.sample_models import SAMPLES, adamw
from torch import Tensor, nn

from slimgrad import catalogue, measure
from slimgrad.host import Host
from slimgrad.measuring.model_cache import switch_off_cache
from slimgrad.measuring.profile import Profile
from slimgrad.method import Block, Method, Offer, Record, Refusal, Scope, Undo, hyperparameters
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Option, Scheme
from slimgrad.planning.plan import Choice
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import Programme


@dataclass(frozen=True)
class Coded:
    """One setting of a store on each block that it suits: block path -> the store and the schedule."""

    by_path: dict[str, tuple[CodedStore, SelectiveRecompute]]
    records: dict[str, Record]

    @property
    def choices(self) -> list[Choice]:
        """As a plan writes them."""
        return [
            Choice(path, name, dict(hyperparameters(method)))
            for path, methods in self.by_path.items()
            for name, method in zip(
                (_name(methods[0]), "selective_recompute"), methods, strict=True
            )
        ]

    def attach(self, host: Host) -> Undo:
        """On every block."""
        undo = Undo()
        for path, methods in self.by_path.items():
            for method in methods:
                undo.then(method.attach(Block(path, Scope.BLOCK, host=host)))
        return undo


def stores() -> dict[str, type[CodedStore]]:
    """The methods of the catalogue that keep codes."""
    found = catalogue.methods().items()
    return {name: cls for name, cls in found if issubclass(cls, CodedStore)}


def _name(method: Method) -> str:
    return next(name for name, cls in catalogue.methods().items() if type(method) is cls)


def coded_profile(
    model: nn.Module, loss_fn: Any, batch: Any, optimizer: torch.optim.Optimizer | None = None
) -> Profile:
    """The profile of a model, with what codes do to its gradient."""
    kwargs: dict[str, Any] = {"limit_s": 0.0, "allow_compile": False, "sensitivity": True}
    return measure(model, optimizer, loss_fn, batch, **kwargs)


@functools.cache
def sensitive_profile(sample: str) -> Profile:
    """That of a sample model."""
    model, loss_fn, batch = SAMPLES[sample].make()
    return coded_profile(model, loss_fn, batch, adamw(model))


def plain_layout(profile: Profile) -> Layout:
    """The layout of the step as it is."""
    return layout_of(profile, profile.variants[()])


def records_of(profile: Profile) -> dict[str, Record]:
    """Each block's record in the step as it is."""
    layout, model = plain_layout(profile), model_record(profile, 1, None)
    return {p: block_record(profile, layout, b, model=model) for p, b in layout.blocks.items()}


def keep_everything(record: Record) -> SelectiveRecompute:
    """The schedule in which nothing is run again."""
    assert record.graph is not None
    return SelectiveRecompute(record.graph.saved)


def coded_settings(profile: Profile, cls: type[CodedStore]) -> list[Coded] | Refusal:
    """Each setting on all blocks that it suits, or why no block has one."""
    found: dict[object, Coded] = {}
    reasons: list[str] = []
    for path, record in records_of(profile).items():
        asked = Block(path, Scope.BLOCK, record)
        for store in cls.grades(asked) or [cls()]:
            offer = store.offer(asked)
            if isinstance(offer, Refusal):
                reasons.append(offer.reason)
                continue
            schedule = keep_everything(record)
            both = schedule.offer(Block(path, Scope.BLOCK, offer.record))
            assert isinstance(both, Offer)
            assert isinstance(both.record, Record)
            coded = found.setdefault(store.setting, Coded({}, {}))
            coded.by_path[path], coded.records[path] = (store, schedule), both.record
    return list(found.values()) or Refusal(reasons[0] if reasons else "the model has no blocks")


def programme_of(profile: Profile, coded: Coded) -> Programme:
    """The programme whose only options are ``coded``'s."""
    plain = records_of(profile)
    scheme = Scheme((), (), model_record(profile, 1, None), profile.variants[()])
    found = [
        Option(p, coded.by_path[p], r, "", r.seconds - plain[p].seconds)
        for p, r in coded.records.items()
    ]
    return Programme(scheme, Menu(plain_layout(profile), found))


def one_pass(model: nn.Module, loss_fn: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients from a fixed random state."""
    switch_off_cache(model)
    torch.manual_seed(3)
    loss = loss_fn(model, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), found


def gradient_of(model: nn.Module, loss_fn: Any, batch: Any) -> Tensor:
    """Of all parameters, in a row, in float64."""
    return torch.cat([g.flatten().double() for g in one_pass(model, loss_fn, batch)[1].values()])
