"""What training loses when every block keeps its activations as codes: loss and accuracy beside exact training's.

    python benchmarks/finetuning.py [--tasks vit,cnn,minilm,smollm2] [--seeds 3] [--steps 0] [--stores mesa,few_bit]

Tasks are those of ``tasks.py``: ``vit`` and ``cnn`` learn the handwritten digits of scikit-learn from scratch, ``minilm``
is fine-tuned, every parameter, to tell from 32 tokens which of eight topics of Python's documentation they are of,
``smollm2`` to tell the next token. For each setting of each store and each seed: initial weights, order of batches and
random draws are exact training's; what the store suits is kept as codes in every block. Methods that replace layers
stand beside them (``LAYERS``), ``compact`` with an optimizer of its own at the task's rate and at the best of those tried on
seed 9, which no row is of. Written down: the loss of every step, the accuracy on what was not trained on, the bytes of the ledger's
activations, the relative L2 error of the second batch's gradient in the untrained model, and what ``measure(sensitivity=True)``
said of it on the first. With ``--seeds 0`` nothing is trained: bytes and errors are measured anew in the rows that there are, or
in one row a setting. Rows of other tasks, stores, settings and seeds stay in the file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import slimgrad
from rows import read_rows, write_rows
from slimgrad.host import Host
from slimgrad.layers.compact import compact
from slimgrad.layers.compact_adam import CompactAdam
from slimgrad.layers.compaction import compaction_of
from slimgrad.layers.gradient_filter import gradient_filter
from slimgrad.method import Block, Offer, Record, Scope, Setting, Undo
from slimgrad.methods.activations.approx_bp import ApproxBp
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.memory_sharing_norm import memory_sharing_norm
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.types import Column
from slimgrad.verifying.gradient import captured_gradients, relative_error
from tasks import Task, batches, fresh, loss_of, task

RESULTS = Path(__file__).parent / "results" / "finetuning.jsonl"
LAST = 10  # steps whose loss is averaged as the final one
KEY = ("model", "store", "setting", "seed")


@dataclass(frozen=True)
class Way:
    """What is changed in a model before it is trained, and the optimizer if it is not AdamW at the task's rate."""

    attach: Callable[[nn.Module], Undo]
    predicted_error: float | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    lr: float | None = None


EXACT = Way(lambda model: Undo(), 0.0)


@dataclass
class Coded:
    """One setting on every block that it suits: what is attached where, and the error that was measured for all."""

    stores: dict[str, tuple[CodedStore, SelectiveRecompute]]
    squared_error: float = 0.0

    def attach(self, model: nn.Module) -> Undo:
        """To every block."""
        host, undo = Host(model, None, loss_of), Undo()
        for path, methods in self.stores.items():
            block = Block(path, Scope.BLOCK, host=host)
            for method in methods:
                undo.then(method.attach(block))
        return undo


def records(profile: slimgrad.Profile) -> Iterator[tuple[str, Record, SelectiveRecompute]]:
    """Each block's path and record, and the schedule in which nothing is run again."""
    layout, model = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    for path, block in layout.blocks.items():
        record = block_record(profile, layout, block, model=model)
        if record.graph is not None:
            yield path, record, SelectiveRecompute(record.graph.saved)


def coded_settings(profile: slimgrad.Profile) -> dict[Setting, Coded]:
    """Each setting that was measured, on all blocks."""
    found: dict[Setting, Coded] = {}
    for path, record, schedule in records(profile):
        for name, fields in record.coding:
            store = slimgrad.catalogue.get(name, **dict(fields)).on(record)
            offer = store.offer(Block(path, Scope.BLOCK, record))
            if not isinstance(offer, Offer):
                continue
            coded = found.setdefault((name, fields), Coded({}))
            coded.stores[path] = store, schedule
            coded.squared_error += offer.record.squared_error
    return found


def filtered(chosen: Task) -> Iterator[tuple[dict[str, Any], Way]]:
    """Patches of 2 x 2 pixels in all convolutions, or in the last ones alone, as the paper trains them."""
    model = fresh(chosen, 0)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    for last in (len(convolutions), 4, 2):
        layers = convolutions[-last:]
        attach = functools.partial(gradient_filter, patch=2, layers=layers)
        yield {"patch": 2, "last": last}, Way(attach)


def compacted(chosen: Task) -> Iterator[tuple[dict[str, Any], Way]]:
    """A quarter of the width of all linear layers' inputs but the classifier's; P stays, as runs are short."""

    def attach(model: nn.Module) -> Undo:
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "head"]
        return compact(model, layers=names)

    optimizer = functools.partial(CompactAdam, weight_decay=1e-2)  # AdamW's
    for lr in (chosen.lr, COMPACT_RATES[chosen.name]):
        yield {"ratio": 0.25, "lr": lr}, Way(attach, optimizer=optimizer, lr=lr)


def low_memory(chosen: Task) -> Iterator[tuple[dict[str, Any], Way]]:
    """``approx_bp`` and norms that share what they keep, as one method."""
    model, batch = fresh(chosen, 0), next(batches(chosen, 0))
    memory_sharing_norm(model)
    profile = slimgrad.measure(model, None, loss_of, batch, allow_compile=False)
    coded = Coded({})
    for path, record, schedule in records(profile):
        for store in ApproxBp.grades(Block(path, Scope.BLOCK, record)):
            coded.stores[path] = store, schedule

    def attach(model: nn.Module) -> Undo:
        return Undo(memory_sharing_norm(model), coded.attach(model))

    yield {}, Way(attach)


LAYERS = {"gradient_filter": filtered, "compact": compacted, "low_memory_bp": low_memory}
COMPACT_RATES = {"vit": 2e-3, "minilm": 4e-4}
OF_TASK = {
    "cnn": ("gradient_filter",),
    "vit": ("compact", "low_memory_bp"),
    "minilm": ("compact", "low_memory_bp"),
    "smollm2": ("low_memory_bp",),
}


def ways(chosen: Task, stores: set[str]) -> Iterator[tuple[str, dict[str, Any], Way]]:
    """Exact training, each setting of each store, and the methods that replace layers."""
    yield "exact", {}, EXACT
    replaced = {name for name in OF_TASK[chosen.name] if not stores or name in stores}
    if not stores or stores - LAYERS.keys():
        model, batch = fresh(chosen, 0), next(batches(chosen, 0))
        profile = slimgrad.measure(
            model, None, loss_of, batch, allow_compile=False, sensitivity=True
        )
        for (name, fields), coded in coded_settings(profile).items():
            if not stores or name in stores:
                yield name, dict(fields), Way(coded.attach, coded.squared_error**0.5)
    for name in sorted(replaced):
        for setting, way in LAYERS[name](chosen):
            yield name, setting, way


def untrained_gradient(chosen: Task, way: Way) -> tuple[dict[str, Tensor], int]:
    """The second batch's gradient (nothing was measured on that one) and the most bytes of activations on the way."""
    model, batch = fresh(chosen, 0), next(itertools.islice(batches(chosen, 0), 1, None))
    undo, found = way.attach(model), dict[str, Tensor]()
    torch.manual_seed(0)
    with captured_gradients(model, found), slimgrad.Ledger(model, inputs=batch) as ledger:
        loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        compaction = compaction_of(parameter)
        if compaction is not None and (lifted := compaction.lifted()) is not None:
            found[name] = lifted
    undo()
    return found, int(max(ledger.timeline.columns[Column.ACTIVATIONS]))


def trained(chosen: Task, seed: int, way: Way) -> tuple[list[float], float]:
    """The loss of every step and the accuracy at the end."""
    model = fresh(chosen, seed)
    undo = way.attach(model)
    optimizer = way.optimizer(model.parameters(), lr=way.lr or chosen.lr)
    losses: list[float] = []
    for batch in batches(chosen, seed):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    undo()
    features, labels = chosen.test
    with torch.no_grad():
        answers = [model.eval()(part).argmax(1) for part in features.split(64)]
    return losses, float((torch.cat(answers) == labels).float().mean())


def rows_of(
    chosen: Task, stores: set[str], num_seeds: int, known: Sequence[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """Exact training's rows, then a row for each setting and seed; of no seed the ``known`` ones with new bytes and errors."""
    exact, plain_bytes = untrained_gradient(chosen, EXACT)
    for name, setting, way in ways(chosen, stores):
        gradient, num_bytes = untrained_gradient(chosen, way)
        row: dict[str, Any] = {
            "model": chosen.name,
            "store": name,
            "setting": setting,
            "activation_bytes": num_bytes,
            "activation_ratio": num_bytes / plain_bytes,
            "gradient_error": relative_error(gradient, exact),
            "predicted_error": way.predicted_error,
        }
        ended, right = list[float](), list[float]()
        for seed in range(num_seeds):
            losses, accuracy = trained(chosen, seed, way)
            ended.append(mean(losses[-LAST:]))
            right.append(accuracy)
            yield {**row, "seed": seed, "losses": losses, "accuracy": accuracy}
        told = " ".join(f"{k}={v}" for k, v in setting.items())
        before = way.predicted_error
        print(
            f"{chosen.name:7} {name:17} {told:26} activations {row['activation_ratio']:.3f} gradient "
            f"{row['gradient_error']:.4f} (measured before {'-' if before is None else f'{before:.4f}'}) "
            + (f"loss {mean(ended):.4f} accuracy {mean(right):.2%}" if ended else ""),
            flush=True,
        )
        if not num_seeds:
            mine = [old for old in known if all(old.get(k) == row[k] for k in KEY[:3])]
            yield from ({**old, **row} for old in mine or [{}])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default="vit,cnn,minilm")
    parser.add_argument("--stores", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    stores = {name for name in asked.stores.split(",") if name}
    tasks = (task(name, asked.steps) for name in asked.tasks.split(","))
    known = read_rows(asked.out)
    rows = (row for chosen in tasks for row in rows_of(chosen, stores, asked.seeds, known))
    write_rows(asked.out, ([row] for row in rows), KEY)


if __name__ == "__main__":
    main()
