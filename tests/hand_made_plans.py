"""Plans made by hand: exactly the methods a test asks for, with what the simulator predicts for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from slimgrad import catalogue
from slimgrad.measuring.profile import Profile, Setting
from slimgrad.method import Block, Method, ModelRecord, Record, Refusal, Scope, method_name
from slimgrad.planning.menu import Menu
from slimgrad.planning.offers import Allowed, Option, Scheme, attach_order
from slimgrad.planning.plan import Plan, _plan_of
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import Programme
from slimgrad.types import Budget, Exactness


@dataclass
class Refused(Exception):  # noqa: N818
    """A method refused what a test asked for."""

    method: str
    reason: str


def hand_made(
    profile: Profile,
    on_blocks: Mapping[str, str] | Iterable[str] = (),
    *,
    variant: tuple[Setting, ...] = (),
    on_model: Iterable[str] = (),
    clip_grad_norm: float | None = None,
) -> Plan:
    """The plan that applies ``on_blocks`` (path -> method; paths alone are recomputed) and ``on_model``.

    ``variant`` is one of the profile's. Raises ``Refused`` where a method refuses.
    """
    if not isinstance(on_blocks, Mapping):
        on_blocks = dict.fromkeys(on_blocks, "recompute")
    scheme = _scheme(profile, variant, on_model, clip_grad_norm)
    layout = layout_of(profile, scheme.trace)
    options = [_option(profile, scheme, layout, p, m) for p, m in on_blocks.items()]
    programme = Programme(scheme, Menu(layout, options))
    live, changes = programme.replay(np.ones(len(options)))
    solution = programme._solution(np.ones(len(options)), changes, int(live.max()))
    allowed = Allowed(Exactness.DIFFERENT, clip_grad_norm=clip_grad_norm)
    return _plan_of(profile, allowed, Budget.parse("min"), solution.peak_bytes, solution)


def micro_batched(profile: Profile, parts: int) -> tuple[Setting, ...] | None:
    """The variant with that many micro-batches and nothing else (1: the step as it is); None without one."""
    if parts == 1:
        return ()
    for variant in profile.variants:
        alone = len(variant) == 1 and variant[0][0] == "micro_batches"
        if alone and dict(variant[0][1])["num"] == parts:
            return variant
    return None


def block_paths(profile: Profile) -> list[str]:
    """The blocks that save anything for backward."""
    layout = layout_of(profile, profile.variants[()])
    return [path for path, block in layout.blocks.items() if any(block.saved.values())]


def _scheme(
    profile: Profile, variant: tuple[Setting, ...], on_model: Iterable[str], clip: float | None
) -> Scheme:
    rewriting = [catalogue.get(name, **dict(fields)) for name, fields in variant]
    parts = max((getattr(m, "num", 1) for m in rewriting), default=1)
    record: ModelRecord = model_record(profile, parts, clip)
    taken: list[tuple[Method, str]] = []
    for method in sorted([*rewriting, *map(catalogue.get, on_model)], key=attach_order):
        offer = method.offer(Block("", Scope.MODEL, record))
        if isinstance(offer, Refusal):
            raise Refused(method_name(method), offer.reason)
        assert isinstance(offer.record, ModelRecord)
        record = offer.record
        taken.append((method, offer.note))
    return Scheme(variant, tuple(taken), record, profile.variants[variant])


def _option(profile: Profile, scheme: Scheme, layout: Layout, path: str, name: str) -> Option:
    method = catalogue.get(name)
    record = block_record(profile, layout, layout.blocks[path], model=scheme.record)
    offer = method.offer(Block(path, Scope.BLOCK, record))
    if isinstance(offer, Refusal):
        raise Refused(name, offer.reason)
    assert isinstance(offer.record, Record)
    added = (offer.record.seconds - record.seconds) * scheme.repeats
    return Option(path, (method,), offer.record, offer.note, added)
