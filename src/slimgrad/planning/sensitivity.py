"""What each code of saved tensors does to the gradient of a real step, block by block, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from slimgrad import catalogue
from slimgrad.batches import batch_size, narrow
from slimgrad.code import Use
from slimgrad.errors import LossError
from slimgrad.host import Host
from slimgrad.measuring.fake import is_fake
from slimgrad.measuring.machine import free_bytes
from slimgrad.measuring.profile import Profile
from slimgrad.measuring.randomness import RandomState
from slimgrad.measuring.stopwatch import OtherData, seconds_of
from slimgrad.measuring.trace import checked_loss, untouched
from slimgrad.method import Block, CodingCost, OperationGraph, Scope, Setting, Undo
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record

_PROBES = 3  # blocks of one kind that are tried with each setting,
_MANY = 12  # and with one of the settings, whose errors tell how blocks differ
_SAMPLE_ELEMENTS = 2**21  # of the tensor on which a code is timed
_ROUNDS = 3

Costs = dict[str, dict[Setting, CodingCost]]
Progress = Callable[[str], None]
_Saves = tuple[type[CodedStore], tuple[Use | None, ...]]


@dataclass(frozen=True)
class _Trial:
    """One setting on one block."""

    path: str
    store: CodedStore
    graph: OperationGraph

    @property
    def saves(self) -> _Saves:
        """What tells by how much each storage counts: each method rounds other values badly."""
        return type(self.store), self.graph.uses


class Effect(NamedTuple):
    """How far a step's gradient is off: the square of its relative L2 error, and that error and the cosine of the
    gradient of a block's own parameters."""

    squared_error: float
    own_error: float
    own_cosine: float


def coding_costs(
    host: Host, batch: Any, profile: Profile, progress: Progress = lambda _: None
) -> Costs:
    """For each block and each setting that suits it, the seconds of its code and what it does to the gradient.

    One step is run as it is, and one with each setting on each of at most three blocks of one kind (twelve with one
    setting), from the same random state. Between those blocks, what is interpolated is how much worse a setting is than
    that one: some blocks are more sensitive than their neighbours, to any code. One step more has each setting on all
    blocks at once, and tells how their errors add up. Nothing of the user's is changed.

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
    other = OtherData(host.device)
    with untouched(host.model):
        passes = _Passes(host, batch)
        shares = {key: _shares(passes, trial) for key, trial in _widest(kinds).items()}
        sensitive = _Sensitive(passes, kinds)
        for number, trials in enumerate(kinds):
            setting = trials[0].store.setting
            progress(f"{number + 1} of {len(kinds)}: {setting[0]} {dict(setting[1]) or ''}")
            spent = _seconds(trials[0], host.device, other)
            mine = _of(trials[0].store.storages, shares[trials[0].saves])
            for trial, off in zip(trials, sensitive.effects(trials), strict=True):
                if not math.isfinite(off.squared_error):
                    continue  # no gradient is left: the setting is not offered there
                cost = CodingCost(*spent, off.squared_error, mine, off.own_error, off.own_cosine)
                costs.setdefault(trial.path, {})[setting] = cost
        progress("each on all blocks at once")
        _add_up(passes, kinds, costs)
    return costs


def _add_up(passes: _Passes, kinds: Sequence[Sequence[_Trial]], costs: Costs) -> None:
    """Let the errors of each setting be no less together than what it does on all its blocks at once.

    Errors that have nothing to do with one another add up as squares; those of a code that errs to one side add up to
    more. The blocks at once are all whose errors are together at most the gradient itself, the smallest first: larger
    ones multiply.
    """
    by_setting: dict[Setting, list[_Trial]] = {}
    for trials in kinds:
        by_setting.setdefault(trials[0].store.setting, []).extend(trials)
    for setting, trials in by_setting.items():
        told = [(costs[t.path][setting], t) for t in trials if setting in costs.get(t.path, {})]
        told.sort(key=lambda pair: pair[0].squared_error)
        sums = np.cumsum([cost.squared_error for cost, _ in told])
        num = int((sums <= 1.0).sum())
        if num < 2 or not sums[num - 1]:
            continue
        more = passes.squared_error([trial for _, trial in told[:num]]) / float(sums[num - 1])
        if math.isfinite(more) and more > 1:
            for cost, trial in told:
                squared_error = more * cost.squared_error
                costs[trial.path][setting] = replace(cost, squared_error=squared_error)


class _Sensitive:
    """What settings do on blocks, from those that are tried.

    Of blocks that save the same, the setting that codes the most of it is tried on many: ``_curves`` has what it does on
    each, in between interpolated; of another setting, how much worse it is than that one.
    """

    def __init__(self, passes: _Passes, kinds: Sequence[Sequence[_Trial]]) -> None:
        self._passes = passes
        self._curves: dict[tuple[Use | None, ...], tuple[Sequence[_Trial], np.ndarray]] = {}
        for trials in kinds:
            uses, most = trials[0].graph.uses, len(trials[0].store.storages)
            known = self._curves.get(uses)
            if known is None or most > len(known[0][0].store.storages):
                self._curves[uses] = trials, np.empty(0)
        for uses, (trials, _) in self._curves.items():
            at, found = self._tried(trials, _MANY)
            self._curves[uses] = trials, _between(len(trials), at, found)

    def effects(self, trials: Sequence[_Trial]) -> list[Effect]:
        """What the setting of ``trials`` does on each of their blocks."""
        reference, curve = self._curves[trials[0].graph.uses]
        if trials is not reference:
            at, found = self._tried(trials, _PROBES)
            paths = [trial.path for trial in reference]
            if [trial.path for trial in trials] == paths and bool((curve > 0).all()):
                curve = curve * _between(len(trials), at, found / curve[at])
            else:
                curve = _between(len(trials), at, found)
        return [Effect(square, own, max(-1.0, 1 - off)) for square, own, off in curve.tolist()]

    def _tried(self, trials: Sequence[_Trial], most: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of the blocks that are tried, and on each of them the two errors and 1 less the cosine."""
        at = np.unique(np.linspace(0, len(trials) - 1, most).round().astype(int))
        found = [self._passes.effect(trials[i]) for i in at]
        return at, np.array([(e.squared_error, e.own_error, 1 - e.own_cosine) for e in found])


def _between(num: int, at: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` at the places ``at``, in between interpolated: a row for each of ``num`` places."""
    columns = [np.interp(np.arange(num), at, column) for column in values.T]
    return np.stack(columns, axis=1)


def gradient_noise(host: Host, batch: Any, paths: Sequence[str]) -> dict[str, float]:
    """How far another batch of as many samples would take the gradient, by what its halves say.

    The standard deviation as a share of the gradient's length, of the whole model's gradient at "" and of the own
    one of each block in ``paths``: |g1 - g2| / |g1 + g2| of the halves' gradients, whether the loss is a mean or a sum.
    Empty for a batch of one sample, one that cannot be split, or whose halves the loss does not take.
    """
    size = batch_size(batch)
    if size < 2:
        return {}
    half = size // 2
    try:
        with untouched(host.model):
            passes = [
                _gradients(host, narrow(batch, start, start + half)) for start in (0, size - half)
            ]
    except Exception:  # the loss is the user's: it may want a whole batch
        return {}
    first, second = passes
    found: dict[str, float] = {}
    for path in ("", *paths):
        mine = [n for n in first.keys() & second.keys() if _is_of(n, path)]
        length = sum(_squares(first[n] + second[n]) for n in mine)
        if length:
            apart = sum(_squares(first[n] - second[n]) for n in mine)
            found[path] = (apart / length) ** 0.5
    return found


def _is_of(name: str, path: str) -> bool:
    """Whether a parameter of this name is of the module at ``path``."""
    return not path or name.startswith(f"{path}.")


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
        self._exact = _gradients(host, batch)
        self._size = sum(map(_squares, self._exact.values()))

    def effect(self, trial: _Trial) -> Effect:
        """What the gradient is with a setting on one block, in which nothing is run again."""
        found = self._gradients_with([trial])
        off = {n: _squares(g - self._exact[n]) for n, g in found.items()}
        own = [n for n in found if _is_of(n, trial.path)]
        length = sum(_squares(self._exact[n]) for n in own)
        lengths = length * sum(_squares(found[n]) for n in own)
        along = sum(float((found[n].double() * self._exact[n]).sum()) for n in own)
        return Effect(
            sum(off.values()) / self._size if self._size else 0.0,
            (sum(off[n] for n in own) / length) ** 0.5 if length else 0.0,
            along / lengths**0.5 if lengths else 1.0,
        )

    def squared_error(self, trials: Sequence[_Trial]) -> float:
        """That of the gradient with all ``trials`` at once."""
        found = self._gradients_with(trials)
        off = sum(_squares(g - self._exact[n]) for n, g in found.items())
        return off / self._size if self._size else 0.0

    def _gradients_with(self, trials: Sequence[_Trial]) -> dict[str, Tensor]:
        undo = Undo()
        try:
            for trial in trials:
                block = Block(trial.path, Scope.BLOCK, host=self._host)
                undo.then(trial.store.attach(block))
                undo.then(SelectiveRecompute(trial.graph.saved).attach(block))
            self._random.restore()
            return _gradients(self._host, self._batch)
        finally:
            undo()


def _gradients(host: Host, batch: Any) -> dict[str, Tensor]:
    for share in host.split(batch):
        checked_loss(host.loss_fn(host.model, share.batch)).backward()
    found: dict[str, Tensor] = {}
    for name, parameter in host.model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _widest(kinds: Sequence[Sequence[_Trial]]) -> dict[_Saves, _Trial]:
    """For each method, on blocks that save the same: the middle one of its settings that code the most, on the middle block."""
    found: dict[_Saves, list[_Trial]] = {}
    for trials in kinds:
        middle = trials[len(trials) // 2]
        known = found.setdefault(middle.saves, [])
        if known and len(middle.store.storages) > len(known[0].store.storages):
            known.clear()
        if not known or len(middle.store.storages) == len(known[0].store.storages):
            known.append(middle)
    return {saves: alike[len(alike) // 2] for saves, alike in found.items()}


def _shares(passes: _Passes, trial: _Trial) -> dict[int, float]:
    """The squared error that each storage alone brings."""
    if len(trial.store.storages) == 1:
        return dict.fromkeys(trial.store.storages, 1.0)
    alone = {s: replace(trial, store=trial.store.only(s)) for s in trial.store.storages}
    return {s: passes.effect(one).squared_error for s, one in alone.items()}


def _of(storages: Sequence[int], errors: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    """The share of each of ``storages`` in what they bring together."""
    known = [e for e in errors.values() if math.isfinite(e)]
    largest = max(known, default=1.0)
    mine = {s: e if math.isfinite(e := errors.get(s, largest)) else largest for s in storages}
    total = sum(mine.values())
    return tuple((s, e / total if total else 1 / len(mine)) for s, e in mine.items())


def _seconds(trial: _Trial, device: torch.device, other: OtherData) -> tuple[float, float]:
    """Seconds an element to encode and to decode, on values like those of a normed layer that the cache does not hold."""
    uses = [use for s in trial.store.storages if (use := trial.graph.uses[s]) is not None]
    use = max(uses, key=lambda use: use.num_elements)
    sample, code = _sample(use, device), trial.store.code()
    encoded = code.encode(sample)

    def cold(run: Callable[[], object]) -> float:
        run()
        found: list[float] = []
        for _ in range(_ROUNDS):
            other.use()
            found.append(seconds_of(run, device))
        return median(found) / sample.numel()

    return cold(lambda: code.encode(sample)), cold(encoded.decode)


def _sample(use: Use, device: torch.device) -> Tensor:
    row = max(1, use.row)
    rows = max(1, min(use.num_elements, _SAMPLE_ELEMENTS) // row)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, row, generator=generator).to(device, use.torch_dtype)


def setting_text(setting: Setting) -> str:
    """A setting for a reader: ``quantized_store bits=4``."""
    name, fields = setting
    return " ".join([name, *(f"{k}={v}" for k, v in fields)])


def largest_errors(costs: Costs) -> Sequence[tuple[Setting, float]]:
    """For each setting, the relative L2 error of the gradient with it on every block, smallest first."""
    total: dict[Setting, float] = {}
    for by_setting in costs.values():
        for setting, cost in by_setting.items():
            total[setting] = total.get(setting, 0.0) + cost.squared_error
    return sorted(((s, e**0.5) for s, e in total.items()), key=lambda item: item[1])
