"""What each code of saved tensors does to the gradient of a real step, block by block, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimgrad import catalogue
from slimgrad.code import Use
from slimgrad.errors import LossError
from slimgrad.host import Host
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.machine import free_bytes
from slimgrad.measuring.profile import Profile
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.stopwatch import seconds_of
from slimgrad.measuring.trace import checked_loss, untouched
from slimgrad.method import Block, CodingCost, OperationGraph, Scope, Setting, Undo
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record

_PROBES = 3  # blocks of one kind that are tried; between them the error is interpolated
_SAMPLE_ELEMENTS = 2**21  # of the tensor on which a code is timed
_ROUNDS = 3

Costs = dict[str, dict[Setting, CodingCost]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Trial:
    """One setting on one block."""

    path: str
    store: CodedStore
    graph: OperationGraph


def coding_costs(
    host: Host, batch: Any, profile: Profile, progress: Progress = lambda _: None
) -> Costs:
    """For each block and each setting that suits it, the seconds of its code and what it does to the gradient.

    One step is run as it is, and one with each setting on each of at most three blocks of one kind, from the same
    random state; the square of the relative L2 error of the whole gradient is what is noted, interpolated between
    those blocks. Nothing of the user's is changed.

    Raises ``LossError`` where a plain step does not fit into half of the memory that is free.
    """
    if any(is_fake(p) for p in host.model.parameters()):
        raise LossError("what codes do to gradients can be measured on real tensors only")
    if 2 * profile.peak_bytes > free_bytes(host.device):
        raise LossError(
            "a plain step must fit into half of the free memory to measure what codes do to gradients: "
            "measure on a smaller batch"
        )
    kinds = _kinds(profile)
    costs: Costs = {}
    with untouched(host.model):
        passes = _Passes(host, batch)
        shares = {uses: _shares(passes, alike) for uses, alike in _widest(kinds).items()}
        for number, trials in enumerate(kinds):
            setting = trials[0].store.setting
            progress(f"{number + 1} of {len(kinds)}: {setting[0]} {dict(setting[1]) or ''}")
            probes = np.unique(np.linspace(0, len(trials) - 1, _PROBES).round().astype(int))
            errors = [
                passes.squared_error(trials[i].path, trials[i].store, trials[i].graph)
                for i in probes
            ]
            spent = _seconds(trials[0], host.device)
            mine = _of(trials[0].store.storages, shares[trials[0].graph.uses])
            between = np.interp(np.arange(len(trials)), probes, errors)
            for trial, error in zip(trials, between.tolist(), strict=True):
                if not math.isfinite(error):
                    continue  # no gradient is left: the setting is not offered there
                costs.setdefault(trial.path, {})[setting] = CodingCost(*spent, error, mine)
    return costs


def _kinds(profile: Profile) -> list[list[_Trial]]:
    """The trials of one setting on blocks that save the same, in the blocks' order."""
    trace = profile.variants[()]
    layout, record = layout_of(profile, trace), model_record(profile, 1, None)
    stores = [c for c in catalogue.methods().values() if issubclass(c, CodedStore)]
    found: dict[tuple[Any, ...], list[_Trial]] = {}
    for path, block in layout.blocks.items():
        measured = block_record(profile, layout, block, model=record)
        if measured.graph is None:
            continue
        for cls in stores:
            for store in cls.grades(Block(path, Scope.BLOCK, measured)):
                key = store.setting, store.storages, measured.graph.uses
                found.setdefault(key, []).append(_Trial(path, store, measured.graph))
    return list(found.values())


class _Passes:
    """Forward and backward passes from one random state, and the gradient without codes."""

    def __init__(self, host: Host, batch: Any) -> None:
        self._host, self._batch, self._random = host, batch, RandomState.now()
        self._exact = self._gradients()
        self._size = sum(float(g.double().square().sum()) for g in self._exact.values())

    def squared_error(self, path: str, store: CodedStore, graph: OperationGraph) -> float:
        """The square of the gradient's relative L2 error with ``store`` on one block, in which nothing is run again."""
        block = Block(path, Scope.BLOCK, host=self._host)
        undo = Undo(store.attach(block))
        try:
            undo.then(SelectiveRecompute(graph.saved).attach(block))
            found = self._gradients()
        finally:
            undo()
        off = sum(float((g.double() - self._exact[n]).square().sum()) for n, g in found.items())
        return off / self._size if self._size else 0.0

    def _gradients(self) -> dict[str, Tensor]:
        self._random.restore()
        for share in self._host.split(self._batch):
            checked_loss(self._host.loss_fn(self._host.model, share.batch)).backward()
        found: dict[str, Tensor] = {}
        for name, parameter in self._host.model.named_parameters():
            if parameter.grad is not None:
                found[name], parameter.grad = parameter.grad, None
        return found


def _widest(kinds: Sequence[Sequence[_Trial]]) -> dict[tuple[Use | None, ...], _Trial]:
    """For blocks that save the same, the first store that codes the most of it, on the one in the middle."""
    found: dict[tuple[Use | None, ...], _Trial] = {}
    for trials in kinds:
        middle = trials[len(trials) // 2]
        known = found.setdefault(middle.graph.uses, middle)
        if len(middle.store.storages) > len(known.store.storages):
            found[middle.graph.uses] = middle
    return found


def _shares(passes: _Passes, trial: _Trial) -> dict[int, float]:
    """The squared error that each storage alone brings."""
    if len(trial.store.storages) == 1:
        return dict.fromkeys(trial.store.storages, 1.0)
    alone = ((s, replace(trial.store, storages=(s,))) for s in trial.store.storages)
    return {s: passes.squared_error(trial.path, store, trial.graph) for s, store in alone}


def _of(storages: Sequence[int], errors: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """The share of each of ``storages`` in what they bring together."""
    known = [e for e in errors.values() if math.isfinite(e)]
    largest = max(known, default=1.0)
    mine = {s: e if math.isfinite(e := errors.get(s, largest)) else largest for s in storages}
    total = sum(mine.values())
    return tuple((s, e / total if total else 1 / len(mine)) for s, e in mine.items())


def _seconds(trial: _Trial, device: torch.device) -> tuple[float, float]:
    """Seconds an element to encode and to decode, on values like those of a normed layer."""
    uses = [use for s in trial.store.storages if (use := trial.graph.uses[s]) is not None]
    use = max(uses, key=lambda use: use.num_elements)
    sample, code = _sample(use, device), trial.store.code()
    code.encode(sample).decode()
    spent = [seconds_of(lambda: code.encode(sample), device) for _ in range(_ROUNDS)]
    encoded = code.encode(sample)
    back = [seconds_of(encoded.decode, device) for _ in range(_ROUNDS)]
    return median(spent) / sample.numel(), median(back) / sample.numel()


def _sample(use: Use, device: torch.device) -> Tensor:
    row = max(1, use.row)
    rows = max(1, min(use.num_elements, _SAMPLE_ELEMENTS) // row)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, row, generator=generator).to(device, use.torch_dtype)


def largest_errors(costs: Costs) -> Sequence[tuple[Setting, float]]:
    """For each setting, the relative L2 error of the gradient with it on every block, smallest first."""
    total: dict[Setting, float] = {}
    for by_setting in costs.values():
        for setting, cost in by_setting.items():
            total[setting] = total.get(setting, 0.0) + cost.squared_error
    return sorted(((s, e**0.5) for s, e in total.items()), key=lambda item: item[1])
