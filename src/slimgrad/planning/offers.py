"""Asks every method of the catalogue: which schemes for the whole step, and which options for each block."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from slimgrad import catalogue
from slimgrad.measuring.profile import Profile, Setting
from slimgrad.measuring.trace import Trace
from slimgrad.method import (
    Block,
    Graded,
    Method,
    ModelRecord,
    Offer,
    Record,
    Refusal,
    Restore,
    Rewriting,
    Scope,
    method_name,
)
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.calls import BlockLayout
from slimgrad.planning.coded import coded_ways, undominated
from slimgrad.planning.runs import chains, segments
from slimgrad.planning.settings import block_record, model_record
from slimgrad.planning.simulate import Layout
from slimgrad.storage.stored import HAND_OVER_S
from slimgrad.types import Exactness

_CODING_SHARE = 0.15  # of a plain step's seconds that codes may take
_NOISE = 0.02  # of the plain passes' seconds
_SPENT = 0.9  # of the error that is allowed


@dataclass(frozen=True)
class Allowed:
    """What the user allows: the loosest rung, the methods of rung ``different`` named one by one, and none in ``forbid``."""

    exactness: Exactness = Exactness.EXACT
    allow: tuple[str, ...] = ()
    error: float | None = None  # the relative L2 error of the whole gradient that codes may bring
    clip_grad_norm: float | None = None
    compile: bool = True
    num_steps: int = 1000
    forbid: tuple[str, ...] = ()

    @property
    def planned_error(self) -> float:
        """What plans spend of ``error``: errors are foretold to some percent, and the bound is to hold when measured."""
        return _SPENT * (self.error or 0.0)

    def permits(self, method: Method | type[Method]) -> bool:
        """Whether a method may be used at all."""
        if not self.compile and getattr(method, "compiles", False):
            return False
        if method_name(method) in self.forbid:
            return False
        if method.exactness is Exactness.DIFFERENT:
            return method_name(method) in self.allow
        return self.exactness.allows(method.exactness)


@dataclass(frozen=True)
class Option:
    """One method, or several composed, offered for one block, or for the blocks ``paths`` in a row."""

    path: str
    methods: tuple[Method, ...]
    record: Record
    note: str
    added_s: float
    paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # on the methods before the last
    coding_s: float = 0.0  # of a step, spent on codes

    @property
    def where(self) -> str | tuple[str, ...]:
        """The block, as a layout names it."""
        return self.paths or self.path

    @property
    def covers(self) -> tuple[str, ...]:
        """The paths of the blocks that it decides about."""
        return self.paths or (self.path,)


@dataclass(frozen=True)
class Scheme:
    """One way to run the whole step: a traced variant, and the methods of scope ``model`` on top of it."""

    variant: tuple[Setting, ...]
    methods: tuple[
        tuple[Method, str], ...
    ]  # with their notes, in the order in which they are attached
    record: ModelRecord
    trace: Trace
    plain_s: float = 0.0  # the passes as they are

    @property
    def repeats(self) -> float:
        """How often the traced passes are run in one step."""
        return self.record.micro_batches / self.trace.num_shares

    @property
    def seconds(self) -> float:
        """One step with every block kept as it is.

        What a rewritten step saves is counted where real passes showed it, less what may be noise.
        """
        passes = float(self.trace.op_seconds.sum()) * self.repeats
        doubt = _NOISE * self.plain_s if self.trace.is_timed else self.plain_s
        passes = max(passes, min(passes + doubt, self.plain_s))
        return passes + self.record.update_s + self.record.extra_s


def coding_limit_s(profile: Profile) -> float:
    """The seconds of a step that all its codes together may take."""
    return _CODING_SHARE * profile.seconds


def check_allowed(names: Sequence[str]) -> None:
    """Raise ``MethodError`` for a name in ``allow`` or ``forbid`` that is no method."""
    for name in names:
        catalogue.get(name)


def schemes(profile: Profile, allowed: Allowed) -> list[Scheme]:
    """Every scheme that the allowed methods offer, fastest first."""
    found: list[Scheme] = []
    plain_s = float(profile.variants[()].op_seconds.sum())
    for variant, trace in profile.variants.items():
        rewriting = [catalogue.get(name, **dict(fields)) for name, fields in variant]
        if not all(allowed.permits(m) for m in rewriting):
            continue
        parts = max((getattr(m, "num", 1) for m in rewriting), default=1)
        record = model_record(profile, parts, allowed.clip_grad_norm, allowed.num_steps)
        first = _compose(rewriting, record)
        if first is None:
            continue
        for subset in _subsets(_model_methods(allowed)):
            composed = _compose(subset, first[0])
            if composed is not None:
                methods = first[1] + composed[1]
                found.append(Scheme(variant, methods, composed[0], trace, plain_s))
    return sorted(found, key=lambda s: (s.seconds, len(s.methods), float(s.trace.op_seconds.sum())))


def _model_methods(allowed: Allowed) -> list[Method]:
    methods: list[Method] = []
    for cls in catalogue.methods().values():
        if allowed.permits(cls) and cls.scope is Scope.MODEL and not isinstance(cls, Rewriting):
            methods.append(cls())
    return methods


def _subsets(methods: Sequence[Method]) -> Iterator[tuple[Method, ...]]:
    for size in range(len(methods) + 1):
        yield from itertools.combinations(methods, size)


def _compose(
    methods: Sequence[Method], record: ModelRecord
) -> tuple[ModelRecord, tuple[tuple[Method, str], ...]] | None:
    """Offer the record to each method in the order in which they are attached; None if one refuses."""
    taken: list[tuple[Method, str]] = []
    for method in sorted(methods, key=attach_order):
        offer = method.offer(Block("", Scope.MODEL, record))
        if isinstance(offer, Refusal):
            return None
        assert isinstance(offer.record, ModelRecord)
        record = offer.record
        taken.append((method, offer.note))
    return record, tuple(taken)


def attach_order(method: Method) -> tuple[int, int, str]:
    """Rewriting methods first, then what stores, then what decides when updates happen."""
    order = {"optimizer_state": 1, "gradients": 2}
    column = order.get(method.column.value, 0)
    return (0 if isinstance(type(method), Rewriting) else 1, column, method_name(method))


def options(profile: Profile, scheme: Scheme, layout: Layout, allowed: Allowed) -> list[Option]:
    """For each block, and blocks in a row, what each method offers (keeping them as they are is always possible)."""
    permitted = [c for c in catalogue.methods().values() if allowed.permits(c)]
    stores = [c for c in permitted if issubclass(c, CodedStore)]
    single = [c for c in permitted if c.scope is Scope.BLOCK and c not in stores]
    several = [c for c in permitted if c.scope is Scope.RUN]
    found: list[Option] = []
    recorded = functools.partial(
        block_record, profile, layout, model=scheme.record, num_steps=allowed.num_steps
    )
    for path in layout.blocks:
        record = recorded(layout.block(path))
        found += _offered(scheme, layout, record, path, single)
        if record.coding and stores:
            coded = _coded(scheme, layout, record, path, stores, allowed)
            found += [o for o in coded if _is_within(o, profile, allowed)]
    if several and layout.trace.reads:
        for chain in chains(layout):
            for segment in segments(chain):
                found += _offered(scheme, layout, recorded(layout.block(segment)), segment, several)
    return found


def _offered(
    scheme: Scheme,
    layout: Layout,
    record: Record,
    where: str | tuple[str, ...],
    classes: list[type[Method]],
) -> Iterator[Option]:
    block = layout.block(where)
    is_run = len(block.paths) > 1
    scope = Scope.RUN if is_run else Scope.BLOCK
    asked = Block(block.path, scope, record, paths=block.paths if is_run else ())
    for cls in classes:
        for method in cls.grades(asked) if issubclass(cls, Graded) else [cls()]:
            offer = method.offer(asked)
            if isinstance(offer, Offer) and isinstance(offer.record, Record):
                changed = _replayed(layout, block, offer.record)
                added = (changed.seconds - record.seconds) * scheme.repeats
                yield Option(block.path, (method,), changed, offer.note, added, asked.paths)


def _coded(
    scheme: Scheme,
    layout: Layout,
    record: Record,
    path: str,
    stores: list[type[CodedStore]],
    allowed: Allowed,
) -> list[Option]:
    """The block with codes in place of what it saves; those left out that another is better than in every way."""
    block, found = layout.block(path), list[Option]()
    again = allowed.permits(SelectiveRecompute)
    for way in coded_ways(path, record, stores, allowed.planned_error, may_run_again=again):
        changed = _replayed(layout, block, way.record)
        added = (changed.seconds - record.seconds) * scheme.repeats
        spent = sum(c.encode_s + c.decode_s for c in way.record.coded) * len(block.groups)
        notes, coding_s = way.notes, spent * scheme.repeats
        found.append(Option(path, way.methods, changed, notes[-1], added, (), notes[:-1], coding_s))
    return undominated(found, lambda o: (o.record.held_bytes, o.added_s, o.record.squared_error))


def _is_within(option: Option, profile: Profile, allowed: Allowed) -> bool:
    """Whether the option alone keeps to what all of them together may bring of error, and take for codes."""
    is_accurate = option.record.squared_error <= allowed.planned_error**2
    return is_accurate and option.coding_s <= coding_limit_s(profile)


def _replayed(layout: Layout, block: BlockLayout, record: Record) -> Record:
    """The record with the seconds of what is really run again or read back, over all of the block's calls."""
    if record.restore is not Restore.OPERATIONS:
        return record
    again = [layout.replayed(g, record) for g in block.groups]
    read_s = sum(a.read_bytes for a in again) / record.read_bytes_s
    read_s += sum(a.num_reads for a in again) * HAND_OVER_S
    read_s += sum(c.decode_s for c in record.coded) * len(block.groups)
    store_s = record.store_s * len(block.groups)
    return replace(record, restore_s=sum(a.seconds for a in again) + read_s, store_s=store_s)


def refusals(profile: Profile, allowed: Allowed) -> dict[str, str]:
    """Why methods of scope ``model`` are not used: their own reasons."""
    reasons = dict(profile.refusals)
    record = model_record(profile, 1, allowed.clip_grad_norm)
    for name, cls in catalogue.methods().items():
        if not allowed.compile and getattr(cls, "compiles", False):
            reasons[name] = "compiling was not allowed (allow_compile=False)"
        elif name in allowed.forbid:
            reasons[name] = "it was forbidden (forbid)"
        elif not allowed.permits(cls):
            reasons[name] = f"its rung, {cls.exactness}, is looser than {allowed.exactness}"
        elif issubclass(cls, CodedStore) and not profile.coding:
            reasons[name] = (
                "no block saves what its code is for, or what it does to the gradient was not measured: "
                "measure with sensitivity=True"
            )
        elif cls.scope is Scope.MODEL and not isinstance(cls, Rewriting):
            offer = cls().offer(Block("", Scope.MODEL, record))
            if isinstance(offer, Refusal):
                reasons[name] = offer.reason
    return reasons
