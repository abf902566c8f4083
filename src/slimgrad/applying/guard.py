"""Looks at a batch before it is run: one larger than planned for is predicted, and split or refused if it does not fit."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from slimgrad import catalogue
from slimgrad.applying.attachment import Attachment
from slimgrad.batches import Shapes, batch_shapes, batch_size, is_within, map_tensors, narrow
from slimgrad.errors import (
    BatchError,
    BatchSplit,
    BatchTooLarge,
    BatchUnchecked,
    LossError,
    PlanError,
)
from slimgrad.host import Batch, Host, Share
from slimgrad.measuring.profile import Profile
from slimgrad.method import Rewriting
from slimgrad.methods.gradients.micro_batches import has_batch_statistics
from slimgrad.planning.plan import Choice, Plan
from slimgrad.planning.prediction import (
    at_batch,
    bare_profile,
    block_paths,
    changed_dimensions,
    predicted_peak,
)
from slimgrad.planning.real_passes import setting_of
from slimgrad.planning.splitting import parts_of, splitter
from slimgrad.types import Budget, format_bytes

ON_LARGER = ("split", "raise", "run")
Split: TypeAlias = Callable[[Batch], Sequence[Share]]


@dataclass(frozen=True)
class Admission:
    """A batch that may be run: in ``num_parts`` parts (None: as the plan says), with this predicted peak in bytes.

    ``predicted_bytes`` is None where nothing was predicted.
    """

    num_parts: int | None = None
    predicted_bytes: int | None = None


@dataclass(frozen=True)
class _Refused:
    """What a ``BatchTooLarge`` says of a shape."""

    predicted_bytes: int
    reason: str
    largest_batch_size: int | None


class Guard:
    """Admits batches. ``on_larger`` says what is done with one under which the step would pass the budget.

    ``"split"``: run it in the fewest micro-batches that fit, where they give the update of the whole; else, and
    with ``"raise"``, raise ``BatchTooLarge``. ``"run"``: no batch is looked at.

    A batch no dimension of which is longer than planned, or than in one admitted before, costs a comparison of
    shapes. Any other costs one trace on fake tensors (``measure`` takes one for each variant: from a tenth of a
    second to some seconds a trace), and a few more where it has to be split, once for each shape; for that time
    what is attached to blocks is taken off. Nothing is looked at where the plan has no shapes or its budget is
    ``"min"``.
    """

    def __init__(
        self, attachment: Attachment, on_larger: str, profile: Profile | None = None
    ) -> None:
        if on_larger not in ON_LARGER:
            raise PlanError(
                f"on_larger must be one of {', '.join(map(repr, ON_LARGER))}, not {on_larger!r}"
            )
        self.on_larger, self.profile = on_larger, profile
        self._attachment = attachment
        self._known: dict[tuple[Any, ...], Admission | _Refused] = {}
        self._whole: list[Shapes] = []  # larger than planned, and yet they fit
        self._told: set[tuple[Any, ...]] = set()

    @property
    def host(self) -> Host:
        """The user's objects."""
        return self._attachment.host

    def forget(self) -> None:
        """Nothing is known of any shape any more: the plan was exchanged."""
        self._known.clear()
        self._whole.clear()

    def admit(self, batch: Batch, plan: Plan) -> Admission:
        """How ``batch`` may be run. Nothing of it is run for real.

        Raises ``BatchTooLarge`` where the step would pass the budget, ``LossError`` where loss_fn gives none. Tells by ``BatchSplit`` and ``BatchUnchecked``, once
        for each shape.
        """
        if self.on_larger == "run" or not plan.batch_shapes or Budget.parse(plan.budget).is_min:
            return Admission()
        shapes = batch_shapes(batch)
        if is_within(shapes, plan.batch_shapes):
            return Admission()
        key = tuple(sorted(shapes.items()))
        found = self._known.get(key)
        if found is None:
            if any(is_within(shapes, known) for known in self._whole):
                return Admission()
            found = self._judged(batch, shapes, key, plan)
            self._known[key] = found
        if isinstance(found, _Refused):
            raise _too_large(found, shapes, plan)
        if found.num_parts is not None:
            self._tell(key, _split_message(found, shapes, plan), BatchSplit)
        return found

    def split(self, admission: Admission, plan: Plan) -> Split:
        """How an admitted batch is split."""
        if admission.num_parts is None:
            return self.host.split
        return splitter(admission.num_parts, plan.weighing or {}).split

    def _judged(
        self, batch: Batch, shapes: Shapes, key: tuple[Any, ...], plan: Plan
    ) -> Admission | _Refused:
        room = plan.budget_bytes - plan.tightened_bytes
        try:
            predicted = self._predicted(batch, plan, None)
        except (LossError, BatchError):  # as the real run would
            raise
        except (
            Exception
        ) as error:  # of a model that looks at values, for one: fake tensors have none
            self._tell(key, _unchecked_message(shapes, plan, error), BatchUnchecked)
            return Admission()
        if predicted <= room:
            self._whole.append(shapes)
            return Admission(None, predicted)
        reason = "on_larger is 'raise'" if self.on_larger == "raise" else self._whole_only(plan)
        if not reason:
            admission = self._fewest_parts(batch, plan, room)
            if admission is not None:
                return admission
            reason = "single samples do not fit either, one after another"
        return _Refused(predicted, reason, self._largest(batch, plan, room))

    def _whole_only(self, plan: Plan) -> str:
        """Why larger batches cannot be split under this plan; empty where they can."""
        if plan.weighing is None:
            return plan.refusals.get("micro_batches", "no way was found to weigh parts of a batch")
        if has_batch_statistics(self.host.model):
            return "batch norm's statistics span the batch"
        return ""

    def _fewest_parts(self, batch: Batch, plan: Plan, room: int) -> Admission | None:
        """The smallest number of parts that fits, by bisection: more parts are smaller."""
        size, most = batch_size(batch), parts_of(plan)
        by_length: dict[int, int] = {}  # samples in the largest part -> fewest parts
        for num in range(most + 1, size + 1):
            by_length.setdefault(-(-size // num), num)
        nums = list(by_length.values())
        found: Admission | None = None
        low, high = 0, len(nums)
        while low < high:
            middle = (low + high) // 2
            predicted = self._predicted(batch, plan, nums[middle])
            if predicted <= room:
                found, high = Admission(nums[middle], predicted), middle
            else:
                low = middle + 1
        return found

    def _largest(self, batch: Batch, plan: Plan, room: int) -> int | None:
        """How many samples of this batch's shape fit under the plan as it is; None where that is not known."""
        size = batch_size(batch)
        if not size:
            return None
        low, high = 0, size - 1
        while low < high:
            middle = (low + high + 1) // 2
            part = map_tensors(torch.clone, narrow(batch, 0, middle))  # not a view of the whole
            try:
                fits = self._predicted(part, plan, None) <= room
            except Exception:  # a loss that takes no smaller batch
                return None
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def _predicted(self, batch: Batch, plan: Plan, num_parts: int | None) -> int:
        if self.profile is None:
            self.profile = bare_profile(self.host, plan)
        split: Split | None = None
        if num_parts is not None:
            parts = splitter(num_parts, plan.weighing or {})
            split, plan = parts.split, _in_parts(plan, setting_of(parts))
        methods = [catalogue.get(c.method, **c.fields) for c in plan.choices if not c.path]
        settings = [setting_of(m) for m in methods if isinstance(type(m), Rewriting)]
        paths = block_paths(self.host.model, plan, self.profile)
        with self._attachment.without_blocks(), _quiet(self.host, split):
            return predicted_peak(plan, at_batch(self.profile, self.host, batch, paths, settings))

    def _tell(self, key: tuple[Any, ...], message: str, category: type[Warning]) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(message, category, stacklevel=4)


@contextmanager
def _quiet(host: Host, split: Split | None) -> Generator[None]:
    """Nothing is done with gradients within the body; batches are split by ``split`` (None: as the plan says)."""
    before = host.on_gradient, host.split, host.gradient_order
    host.on_gradient, host.split = None, split or host.split
    try:
        yield
    finally:
        host.on_gradient, host.split, host.gradient_order = before


def _in_parts(plan: Plan, setting: tuple[str, Any]) -> Plan:
    """``plan`` with other micro-batches than its own."""
    name, fields = setting
    others = (c for c in plan.choices if c.method != name)
    return replace(plan, choices=tuple(itertools.chain([Choice("", name, dict(fields))], others)))


def _too_large(found: _Refused, shapes: Shapes, plan: Plan) -> BatchTooLarge:
    fits = ""
    if found.largest_batch_size is not None:
        fits = f"{found.largest_batch_size} samples of this shape fit under the plan as it is. "
    return BatchTooLarge(
        f"the batch is larger than planned for ({changed_dimensions(shapes, plan.batch_shapes)}): the step would "
        f"peak at {format_bytes(found.predicted_bytes)}, above the budget {plan.budget} "
        f"({format_bytes(plan.budget_bytes)}), and it was not split: {found.reason}. Nothing was run. {fits}Give "
        "slim the largest batch that will come as largest_batch, shorten this one, or give a larger budget",
        predicted_bytes=found.predicted_bytes,
        largest_batch_size=found.largest_batch_size,
    )


def _split_message(found: Admission, shapes: Shapes, plan: Plan) -> str:
    return (
        f"the batch is larger than planned for ({changed_dimensions(shapes, plan.batch_shapes)}) and would pass the "
        f"budget {plan.budget}: batches of this shape are run in {found.num_parts} micro-batches, the fewest that "
        f"fit (predicted peak {format_bytes(found.predicted_bytes or 0)}). The update is that of the whole batch up "
        "to rounding; with dropout, masks are drawn for each part"
    )


def _unchecked_message(shapes: Shapes, plan: Plan, error: Exception) -> str:
    return (
        f"the batch is larger than planned for ({changed_dimensions(shapes, plan.batch_shapes)}), and what it needs "
        f"cannot be predicted on fake tensors: {error!r}. It is run all the same"
    )
