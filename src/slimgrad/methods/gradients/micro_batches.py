"""Runs the step on parts of the batch one after another and adds their weighted gradients.

Formula: L(batch) = sum_i w_i L(part_i), so grad L = sum_i w_i grad L(part_i). For a mean over samples
    w_i = b_i / b; for a mean over the targets that count, w_i = n_i / n, with n_i the targets of part i that are
    not ``ignore_index``; for a mean weighted by a mask or by weights, w_i is the part's share of their sum; for a
    sum w_i = 1.
Memory: activations and inputs' derivatives of one part instead of the whole batch, activations / num. Gradients
    live through all parts. Time: the same operations on smaller tensors, num times.
Exactness: exact, where the loss is such a mean or sum and no statistic spans the batch. Which weighting holds is
    found by value, on the user's loss: the loss of a batch with uneven targets against its parts'.
    With dropout the masks differ from the full batch's: the same distribution, other draws.
Limits: a target that the loss ignores by a rule of its own, and that neither the batch nor its operations show, is not
    found (-100, 0 and the ignore_index of cross-entropy are). Batch norm in training mode (its statistics span the batch) is refused; so are losses for which no
    weighting holds (contrastive losses), batches whose tensors disagree on the first dimension, and batches of
    one sample.
References: gradient accumulation is older than any paper on it; the memory law and the treatment of batch norm
    are those of Huang et al., GPipe, section 2 (micro-batches). *departs:* no pipeline; weights by targets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slimgrad.batches import batch_size, map_named, named_tensors, narrow
from slimgrad.errors import BatchError, MethodError
from slimgrad.host import Host, Share
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.trace import untouched
from slimgrad.method import Block, Method, Offer, Paper, Refusal, Scope, Undo
from slimgrad.types import Column, Exactness

_WEIGHINGS = ("targets", "shifted_targets", "samples", "sum", "values")


@dataclass(frozen=True)
class MicroBatches:
    """``num`` parts a batch. ``weigh`` is one of targets, shifted_targets (a causal LM's), samples, sum, values (of a
    mask or of weights); ``targets`` is the path of the tensor that is counted or summed in the batch."""

    num: int = 2
    weigh: str = "samples"
    targets: str = ""
    ignore_index: int = -100

    column: ClassVar[Column] = Column.ACTIVATIONS
    exactness: ClassVar[Exactness] = Exactness.EXACT
    scope: ClassVar[Scope] = Scope.MODEL
    paper: ClassVar[Paper] = Paper(
        "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism",
        "Huang et al.",
        2019,
        "1811.06965",
    )

    def __post_init__(self) -> None:
        if self.num < 1:
            raise MethodError(f"micro_batches needs num of at least 1, not {self.num}")
        if self.weigh not in _WEIGHINGS:
            raise MethodError(
                f"micro_batches weighs by one of {', '.join(_WEIGHINGS)}, not {self.weigh!r}"
            )

    @classmethod
    def settings(cls, host: Host, batch: Any) -> Sequence[Method] | Refusal:
        """Numbers of parts to measure: powers of two that leave at least one sample a part."""
        size = batch_size(batch)
        if size < 2:
            return Refusal("the batch cannot be split along its first dimension into samples")
        if has_batch_statistics(host.model):
            return Refusal("batch norm's statistics span the batch")
        if any(is_fake(p) for p in host.model.parameters()):
            return Refusal(
                "how the loss weighs its samples is found by value, and this model has none"
            )
        found = find_weighing(host, batch)
        if found is None:
            return Refusal("the loss is neither a mean nor a sum over samples or targets")
        nums = [2**k for k in range(1, 6) if 2**k <= size]
        return [cls(num, *found) for num in nums]

    def offer(self, block: Block) -> Offer | Refusal:
        """The measured step already runs in parts; refused where a statistic spans the batch."""
        if block.model_record.has_batch_statistics:
            return Refusal("batch norm's statistics span the batch")
        masks = (
            "; dropout masks differ from the full batch's" if block.model_record.has_dropout else ""
        )
        return Offer(block.model_record, f"{self.num} parts, weighed by {self.weigh}{masks}")

    def attach(self, block: Block) -> Undo:
        """Take over the splitting of batches."""
        host = block.live
        before, host.split = host.split, self.split
        return Undo(lambda: setattr(host, "split", before))

    def split(self, batch: Any) -> Sequence[Share]:
        """The parts of ``batch`` and their weights; parts without a target that counts are left out."""
        size = batch_size(batch)
        if size == 0:
            raise BatchError(
                "micro-batches need tensors that agree on the length of their first dimension"
            )
        num = min(self.num, size)
        edges = [size * i // num for i in range(num + 1)]
        parts = [narrow(batch, a, b) for a, b in itertools.pairwise(edges)]
        counts = [self._count(part) for part in parts]
        total = sum(counts)
        if self.weigh == "sum" or not total:
            return [Share(part, 1.0 if self.weigh == "sum" else 1 / num) for part in parts]
        return [Share(p, c / total) for p, c in zip(parts, counts, strict=True) if c]

    def _count(self, part: Any) -> float:
        if self.weigh in ("samples", "sum"):
            return batch_size(part)
        targets = named_tensors(part)[self.targets]
        if self.weigh == "values":
            return float(targets.double().sum())
        if self.weigh == "shifted_targets":
            targets = targets[:, 1:]
        return int((targets != self.ignore_index).sum())


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a module in training mode computes statistics over the batch."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(m, norms) and m.training for m in model.modules())


def find_weighing(host: Host, batch: Any) -> tuple[str, str, int] | None:
    """The weighting under which parts reproduce the loss of the whole; its tensor's path, and what does not count.

    It has to hold on the batch as it is and on every variant of it in which samples count unequally: targets that
    are ignored here and there, and tensors (masks, weights) with zeros here and there. Variants that the loss does
    not take, or that make it infinite, prove nothing.
    """
    ignored = _ignored_indices(host, batch)
    paths = _target_paths(batch)
    trials = [_uneven(batch, path, index) for path in paths for index in ignored]
    trials += [_uneven(batch, path, 0) for path in named_tensors(batch) if path not in paths]
    held: set[tuple[str, str, int]] | None = None
    for trial in [batch, *(t for t in trials if t is not None)]:
        parts = _losses(host, trial)
        if parts is None and trial is batch:
            return None
        if parts is not None:
            known = _candidates(paths, ignored, batch) if held is None else held
            held = {c for c in known if _holds(c, *parts)}
    order = {weigh: place for place, weigh in enumerate(_WEIGHINGS)}
    return min(
        held or (),
        key=lambda c: (order[c[0]], paths.index(c[1]) if c[1] in paths else 0),
        default=None,
    )


def _candidates(paths: list[str], ignored: list[int], batch: Any) -> set[tuple[str, str, int]]:
    found = {(weigh, path, i) for weigh in _WEIGHINGS[:2] for path in paths for i in ignored}
    found |= {
        ("values", n, -100) for n, t in named_tensors(batch).items() if n not in paths and t.dim()
    }
    return found | {("samples", "", -100), ("sum", "", -100)}


def _ignored_indices(host: Host, batch: Any) -> list[int]:
    """The targets that may not count: those that the loss's own operations leave out, and the usual ones."""
    seen = _IgnoredIndices()
    with seen:
        _losses(host, batch, only_whole=True)
    return list(dict.fromkeys([*seen.found, -100, 0]))


class _IgnoredIndices(TorchDispatchMode):
    """Notes the ``ignore_index`` of every negative log-likelihood that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        names = [a.name for a in func._schema.arguments]
        if "ignore_index" in names and len(args) > (place := names.index("ignore_index")):
            self.found.append(int(args[place]))
        return func(*args, **(kwargs or {}))


def _target_paths(batch: Any) -> list[str]:
    whole = [
        (n, t) for n, t in named_tensors(batch).items() if t.dtype == torch.int64 and t.dim() >= 1
    ]
    named = [n for n, _ in whole if any(word in n.lower() for word in ("label", "target"))]
    return named or [n for n, _ in whole]


def _uneven(batch: Any, path: str, fill: int) -> Any | None:
    """``batch`` with ``fill`` in tensor ``path``, but for about i + 2 places of sample i (of vectors: from 1 on)."""
    whole = named_tensors(batch)[path]
    masked = torch.full_like(whole, fill)
    if whole.dim() == 0:
        return None
    if whole.dim() == 1:
        masked[1:] = whole[1:]
    elif whole.shape[1] >= 4:
        masked[0, :2] = whole[0, :2]
        for i in range(1, whole.shape[0]):
            masked[i, 1 : 4 + i] = whole[i, 1 : 4 + i]
    else:
        return None
    return map_named(lambda name, t: masked if name == path else t, batch)


def _losses(
    host: Host, batch: Any, *, only_whole: bool = False
) -> tuple[float, list[float], list[Any]] | None:
    """The loss of the batch and of its halves, dropout off, and the halves; None where there is none."""
    was_training = [m for m in host.model.modules() if m.training]
    parts = [] if only_whole else [share.batch for share in MicroBatches(2).split(batch)]
    try:
        host.model.eval()
        with untouched(host.model), torch.no_grad():
            total, *losses = [float(_loss(host, each)) for each in (batch, *parts)]
    except Exception:
        return None
    finally:
        for module in was_training:
            module.training = True
    return (total, losses, parts) if math.isfinite(total) else None


def _holds(
    candidate: tuple[str, str, int], total: float, losses: list[float], parts: list[Any]
) -> bool:
    try:
        counts = [MicroBatches(2, *candidate)._count(part) for part in parts]
    except IndexError:
        return False
    weights = [1.0 if candidate[0] == "sum" else c / (sum(counts) or 1) for c in counts]
    value = sum(w * x for w, x in zip(weights, losses, strict=True) if w)
    return abs(value - total) <= 2e-5 * max(abs(total), 1e-12)


def _loss(host: Host, batch: Any) -> Tensor:
    loss = host.loss_fn(host.model, batch)
    return loss.detach().float()
