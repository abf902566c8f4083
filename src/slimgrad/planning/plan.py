"""``plan``: from a profile and a budget to a Plan, the fastest allowed set of methods that fits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

from slimgrad import catalogue
from slimgrad.batches import Shapes, shapes_from_json
from slimgrad.errors import BudgetError, PlanError
from slimgrad.measuring.ledger import MemoryTimeline
from slimgrad.measuring.profile import Profile, field_from_json, versions
from slimgrad.method import Method, Update, hyperparameters, method_name
from slimgrad.planning.calls import Changes, call_bytes
from slimgrad.planning.compiling import DEFAULT_STEPS, check_steps
from slimgrad.planning.offers import Allowed, Scheme, check_allowed, refusals, schemes
from slimgrad.planning.plan_file import check_plan_keys
from slimgrad.planning.simulate import Layout
from slimgrad.planning.solve import Solution
from slimgrad.planning.splitting import check_largest_batch, weighing_of
from slimgrad.planning.workbench import Workbench
from slimgrad.types import Budget, BudgetLike, Column, Exactness, format_bytes

FORMAT = 1
DEFAULT_ERROR = 0.05  # of the gradient, where the rung allows one and the user names none


@dataclass(frozen=True)
class Choice:
    """One method on one block (``path`` empty: on the whole step), and what it is predicted to change.

    ``freed`` maps a column to the bytes by which its highest instant falls when this choice is added to the
    ones before it (negative: rises).
    """

    path: str
    method: str
    fields: Mapping[str, Any]
    note: str = ""
    freed: Mapping[str, int] = field(default_factory=dict)
    added_s: float = 0.0

    @property
    def blocks(self) -> tuple[str, ...]:
        """The paths of all blocks that it is about; none for the whole step."""
        paths: tuple[str, ...] = tuple(self.fields.get("blocks", ()))
        return paths or ((self.path,) if self.path else ())


@dataclass
class Plan:
    """What is done where, with the predicted peak and time. Prints as a table, saves as JSON."""

    fingerprint: str
    budget: str
    budget_bytes: int
    exactness: Exactness
    plain_peak_bytes: int
    plain_seconds: float
    peak_bytes: int
    seconds: float
    choices: tuple[Choice, ...]
    columns: Mapping[str, int]
    refusals: Mapping[str, str]
    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    clip_grad_norm: float | None = None
    needs_step: tuple[str, ...] = ()
    device: str = "cpu"
    tightened_bytes: int = 0
    bound_seconds: float = (
        0.0  # no plan of the linear model is faster; 0: not asked for (budget "min")
    )
    error: float | None = None  # that the gradient may have, a share of its length; None: rounding
    predicted_error: float = 0.0
    num_steps: int = DEFAULT_STEPS
    allow_compile: bool = True
    versions: Mapping[str, str] = field(default_factory=versions)
    batch_shapes: Shapes = field(default_factory=dict)  # of the batch that was planned for
    weighing: Mapping[str, Any] | None = (
        None  # of parts of a larger batch; None: it cannot be split
    )
    timeline: MemoryTimeline | None = field(default=None, compare=False, repr=False)

    @property
    def gap(self) -> float | None:
        """How much slower than the best possible the step may be, a share of its seconds; None: not known."""
        if not self.bound_seconds or not self.seconds:
            return None
        return max(0.0, 1 - self.bound_seconds / self.seconds)

    @property
    def loosest(self) -> Exactness:
        """The loosest rung among the methods chosen."""
        rungs = [catalogue.get(c.method).exactness for c in self.choices]
        return max(rungs, key=lambda e: e.rung, default=Exactness.BITWISE)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        out = {n: getattr(self, n) for n in Plan.__dataclass_fields__ if n != "timeline"}
        return out | {"format": FORMAT, "choices": [asdict(c) for c in self.choices]}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, one choice a line and keys in a fixed order, so that two plans can be compared."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, default=str) + "\n")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan written by ``save``; raises ``PlanError`` if it is not one."""
        try:
            data = json.loads(Path(path).read_text())
            return plan_from_json(data)
        except PlanError as error:
            raise PlanError(f"{path} is not a plan written by Plan.save: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is not a plan written by Plan.save: {error!r}") from error

    def __str__(self) -> str:
        from slimgrad.planning.table import plan_table

        return plan_table(self)


def _choice_from_json(data: Mapping[str, Any]) -> Choice:
    values: dict[str, Any] = dict(data)
    values["fields"] = {name: field_from_json(value) for name, value in data["fields"].items()}
    return Choice(**values)


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """A plan from plain data; raises PlanError, KeyError, TypeError or ValueError where it is not one."""
    check_plan_keys(data, Plan, Choice)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']} is not {FORMAT}")
    known = {n: data[n] for n in Plan.__dataclass_fields__ if n in data}
    known |= {
        "exactness": Exactness(data["exactness"]),
        "choices": tuple(_choice_from_json(c) for c in data["choices"]),
        "allow": tuple(data["allow"]),
        "forbid": tuple(data.get("forbid", ())),
        "needs_step": tuple(data["needs_step"]),
        "batch_shapes": shapes_from_json(data.get("batch_shapes", {})),
    }
    for name in ("budget_bytes", "peak_bytes", "plain_peak_bytes"):
        if not isinstance(known[name], int):
            raise TypeError(f"{name} is {known[name]!r}, not a number of bytes")
    return Plan(**known)


def plan(
    profile: Profile,
    budget: BudgetLike,
    *,
    exactness: Exactness | str = Exactness.EXACT,
    error: float | None = None,
    allow: Sequence[str] = (),
    forbid: Sequence[str] = (),
    largest_batch: Any = None,
    clip_grad_norm: float | None = None,
    reserve_bytes: int = 0,
    allow_compile: bool | None = None,
    steps: int | None = None,
) -> Plan:
    """The fastest set of allowed methods whose predicted peak fits the budget.

    On the rungs ``unbiased`` and ``approximate``, what blocks save may be kept as codes; ``error`` (default 0.05) bounds
    the relative L2 error that they bring to the whole gradient, by what a profile measured with ``sensitivity`` says.
    ``forbid`` names methods that are left out. ``reserve_bytes`` is kept free below the budget (what measuring showed
    the prediction to be short of). ``largest_batch`` is the largest that will come: a profile that was measured for a
    smaller one is refused. Blocks that were measured compiled may be compiled unless ``allow_compile`` is False;
    compiling is paid off over the run's ``steps`` (None: 1000).

    Raises ``BudgetFormatError`` for a budget that cannot be read, ``BudgetError`` where nothing allowed fits,
    with the smallest peak that does and what looser rungs would reach, ``PlanError`` for a profile of a batch
    smaller than ``largest_batch``.
    """
    check_largest_batch(profile, largest_batch)
    allowed = allowed_by(exactness, error, allow, clip_grad_norm, allow_compile, steps, forbid)
    asked = Budget.parse(budget)
    limit, best = solved(profile, asked, allowed, reserve_bytes)
    return _plan_of(profile, allowed, asked, limit, best)


def allowed_by(
    exactness: Exactness | str,
    error: float | None,
    allow: Sequence[str],
    clip_grad_norm: Any,
    allow_compile: bool | None = None,
    steps: int | None = None,
    forbid: Sequence[str] = (),
) -> Allowed:
    """What the user allows; raises ``PlanError`` or ``MethodError`` for what is no rung, norm or method."""
    if clip_grad_norm is not None and not _is_positive(clip_grad_norm):
        raise PlanError(f"clip_grad_norm must be a positive number or None, not {clip_grad_norm!r}")
    compiles, num_steps, rung = allow_compile is not False, check_steps(steps), _rung(exactness)
    allowed = Allowed(
        rung,
        tuple(allow),
        _error(error, rung),
        clip_grad_norm,
        compiles,
        num_steps,
        (forbid,) if isinstance(forbid, str) else tuple(forbid),
    )
    check_allowed((*allowed.allow, *allowed.forbid))
    return allowed


def solved(
    profile: Profile, asked: Budget, allowed: Allowed, reserve_bytes: int = 0
) -> tuple[int, Solution]:
    """The bytes that ``asked`` comes to, and the best solution within; raises ``BudgetError`` if there is none."""
    found = schemes(profile, allowed)
    limit = asked.resolve(profile.peak_bytes)
    workbench = Workbench(profile, allowed)
    if limit is None:
        best = workbench.leanest(found)
        return best.peak_bytes, best
    fastest = workbench.fastest(found, limit - reserve_bytes)
    if fastest is None:
        raise _does_not_fit(profile, allowed, workbench.least_peak_bytes(found), limit, asked)
    return limit, fastest


def needs_sensitivity(exactness: Exactness | str, error: float | None) -> bool:
    """Whether a plan so allowed may use codes, so that what they do to the gradient has to be measured."""
    rung = _rung(exactness)
    return rung in (Exactness.UNBIASED, Exactness.APPROXIMATE) or error is not None


def _error(error: Any, rung: Exactness) -> float | None:
    """The error that codes may bring: what was asked for, on rungs that allow any."""
    if error is not None and not _is_positive(error):
        raise PlanError(
            f"error must be a positive number (0.05: 5 % of the gradient) or None, not {error!r}"
        )
    if not rung.allows(Exactness.UNBIASED):
        if error is not None:
            raise PlanError(
                f"error={error} is for exactness='unbiased' or 'approximate'; {rung.value!r} allows none"
            )
        return None
    return DEFAULT_ERROR if error is None else float(error)


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) < math.inf


def _rung(exactness: Exactness | str) -> Exactness:
    try:
        return Exactness(exactness)
    except ValueError:
        rungs = ", ".join(repr(e.value) for e in Exactness)
        raise PlanError(f"exactness must be one of {rungs}, not {exactness!r}") from None


def _does_not_fit(
    profile: Profile, allowed: Allowed, smallest: int, limit: int, asked: Budget
) -> BudgetError:
    by_rung: dict[str, int] = {}
    known, lowest = _permitted(allowed), smallest
    for rung in Exactness:
        if rung.rung > allowed.exactness.rung and rung is not Exactness.DIFFERENT:
            error = (allowed.error or DEFAULT_ERROR) if rung.allows(Exactness.UNBIASED) else None
            looser = replace(allowed, exactness=rung, error=error)
            if _permitted(looser) != known:
                known = _permitted(looser)
                lowest = Workbench(profile, looser).least_peak_bytes(schemes(profile, looser))
            if lowest < smallest:
                by_rung[rung.value] = lowest
    rungs = "".join(f"; with exactness={r!r} {format_bytes(b)}" for r, b in by_rung.items())
    return BudgetError(
        f"no plan fits the budget {asked.text} ({format_bytes(limit)}): with exactness="
        f"{allowed.exactness.value!r} the smallest peak is {format_bytes(smallest)} "
        f"({smallest} bytes){rungs}. Plain training peaks at {format_bytes(profile.peak_bytes)}. "
        "Give a larger budget, a smaller batch, or budget='min'",
        smallest_bytes=smallest,
        by_rung=by_rung,
    )


def _permitted(allowed: Allowed) -> set[str]:
    return {name for name, cls in catalogue.methods().items() if allowed.permits(cls)}


def _plan_of(profile: Profile, allowed: Allowed, asked: Budget, limit: int, best: Solution) -> Plan:
    timeline = best.layout.timeline(best.changes)
    return Plan(
        fingerprint=profile.fingerprint,
        budget=asked.text,
        budget_bytes=limit,
        exactness=allowed.exactness,
        plain_peak_bytes=profile.peak_bytes,
        plain_seconds=profile.seconds,
        peak_bytes=best.peak_bytes,
        seconds=best.seconds,
        choices=tuple(_choices(profile, best)),
        columns={c.value: v for c, v in timeline.at_peak().items()},
        refusals=refusals(profile, allowed),
        allow=allowed.allow,
        forbid=allowed.forbid,
        clip_grad_norm=allowed.clip_grad_norm,
        needs_step=tuple(_needs_step(best)),
        device=profile.device,
        error=allowed.error,
        predicted_error=sum(o.record.squared_error for o in best.options) ** 0.5,
        bound_seconds=0.0 if asked.is_min else float(best.bound_s),
        batch_shapes=profile.batch_shapes,
        weighing=weighing_of(profile, allowed),
        num_steps=allowed.num_steps,
        allow_compile=allowed.compile,
        timeline=timeline,
    )


def _needs_step(best: Solution) -> list[str]:
    reasons: list[str] = []
    if any(getattr(method, "compiles", False) for method, _ in best.scheme.methods):
        reasons.append("the compiled loss")
    if best.scheme.record.micro_batches > 1:
        reasons.append("micro-batches")
    if best.scheme.record.update is Update.DURING:
        reasons.append("updates during backward")
    if best.scheme.record.gradients_in_files:
        reasons.append("gradients in files")
    if best.scheme.record.state_in_files:
        reasons.append("optimizer state off the device")
    return reasons


def _choices(profile: Profile, best: Solution) -> list[Choice]:
    """The choices in the order of attachment, with what each frees beyond those before it."""
    scheme = best.scheme
    plain = {c.value: v for c, v in profile.columns.items()}
    made: list[Choice] = []
    rewriting = [(m, n) for m, n in scheme.methods if method_name(m) in dict(scheme.variant)]
    others = [(m, n) for m, n in scheme.methods if method_name(m) not in dict(scheme.variant)]
    base = _column_peaks(best.layout, Changes())
    for index, (method, note) in enumerate(rewriting):
        freed = _difference(plain, base) if index == 0 else {}
        made.append(_choice("", method, note, freed, _added_by_compiling(profile, scheme, method)))
    for method, note in others:
        column = method.column.value
        freed = {column: _freed_by_model_method(best, method, profile)}
        made.append(
            _choice(
                "",
                method,
                note,
                freed,
                scheme.record.extra_s if column == "optimizer_state" else 0.0,
            )
        )
    for option in best.options:
        saved = best.layout.blocks[option.path].saved.values()
        plain_bytes = sum(call_bytes(best.layout.trace, storages) for storages in saved)
        freed_bytes = plain_bytes - option.record.held_bytes
        for method, note in zip(option.methods, option.notes, strict=False):
            made.append(_choice(option.path, method, note, {}, 0.0))
        freed = {Column.ACTIVATIONS.value: freed_bytes}
        made.append(_choice(option.path, option.methods[-1], option.note, freed, option.added_s))
    return made


def _added_by_compiling(profile: Profile, scheme: Scheme, method: Method) -> float:
    """What compiling the whole step adds to it (negative: saves); it is the only one of a step's rewritings."""
    if not getattr(method, "compiles", False):
        return 0.0
    passes = float(scheme.trace.op_seconds.sum() - profile.variants[()].op_seconds.sum())
    return passes + scheme.record.compile_s / scheme.record.num_steps


def _freed_by_model_method(best: Solution, method: Method, profile: Profile) -> int:
    record = best.scheme.record
    if method.column is Column.OPTIMIZER_STATE:
        return profile.law.state_bytes - record.buffer_bytes
    peaks = _column_peaks(best.layout, best.changes)
    return record.gradient_bytes - peaks.get(Column.GRADIENTS.value, 0)


def _column_peaks(layout: Layout, changes: Changes) -> dict[str, int]:
    return {c.value: int(v.max(initial=0)) for c, v in layout.timeline(changes).columns.items()}


def _difference(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int]:
    columns = (Column.ACTIVATIONS.value, Column.TEMPORARIES.value)
    return {c: before[c] - after[c] for c in columns if before[c] != after[c]}


def _choice(
    path: str, method: Method, note: str, freed: Mapping[str, int], added_s: float
) -> Choice:
    return Choice(path, method_name(method), dict(hyperparameters(method)), note, freed, added_s)
