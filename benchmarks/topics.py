"""MiniLM fine-tuned on topics in full and in part: accuracy and bytes of training everything, MEFT, a sparse update.

    python benchmarks/topics.py [--ways full,meft,sparse,head] [--seeds 0,1,2] [--steps 120] [--lrs 2e-4,4e-4] [--head-lr 1e-2]

The task is ``minilm`` of ``benchmarks/finetuning.py``: which of eight topics 32 tokens are of. ``full`` trains every
parameter, ``meft`` adapters in a reversible encoder, ``sparse`` the tensors that ``sparse_update`` chooses for half of
the peak, ``head`` the last linear layer alone; ``meft`` and ``sparse`` train that layer too. Of one seed all ways have
the same weights, batches and order. Without ``--lrs`` each way has its own rate of ``WAYS``, the best of those tried on
seed 9, which no result is of. Written down: every step's loss, the accuracy on what was not trained on, the number of
parameters that train, and of the second step the ledger's largest activations and peak. Rows of other ways, seeds, rates
and numbers of steps stay in the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

import slimgrad
from finetuning import LAST
from rows import write_rows
from slimgrad.layers.meft import meft
from slimgrad.methods.gradients.sparse_update import sparse_update
from slimgrad.types import Column
from tasks import Batch, Task, batches, fresh, loss_of, task

RESULTS = Path(__file__).parent / "results" / "topics.jsonl"
KEY = ("way", "seed", "steps", "lr", "head_lr")


def full(model: Any, batch: Batch) -> None:
    """Every parameter."""


def reversible(model: Any, batch: Batch) -> None:
    meft(model.encoder)


def sparse(model: Any, batch: Batch) -> None:
    print(f"  {sparse_update(model, loss_of, batch, budget='50%')}", flush=True)


def head(model: Any, batch: Batch) -> None:
    model.encoder.requires_grad_(False)


@dataclass(frozen=True)
class Way:
    """Changes the classifier in place, given a batch; and the rate that it trains at, the last layer at ``head_lr``."""

    attach: Callable[[Any, Batch], None]
    lr: float
    head_lr: float | None = None


WAYS = {
    "full": Way(full, 1e-4),
    "meft": Way(reversible, 1e-3, 1e-2),
    "sparse": Way(sparse, 1e-4),
    "head": Way(head, 1e-2),
}


def accuracy(model: nn.Module, test: Batch) -> float:
    """Of what was not trained on; the model stays in evaluation mode."""
    features, labels = test
    with torch.no_grad():
        answers = [model.eval()(part).argmax(1) for part in features.split(64)]
    return float((torch.cat(answers) == labels).float().mean())


def trained(chosen: Task, name: str, way: Way, seed: int) -> dict[str, Any]:
    """One run."""
    model = fresh(chosen, seed)
    torch.manual_seed(seed)
    way.attach(model, next(batches(chosen, seed)))
    inside = {id(p) for p in model.encoder.parameters()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_head = [p for p in parameters if id(p) not in inside]
    groups = [
        {"params": [p for p in parameters if id(p) in inside]},
        {"params": of_head, "lr": way.head_lr or way.lr},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=way.lr, fused=True)
    losses, row = list[float](), dict[str, Any]()
    for number, batch in enumerate(batches(chosen, seed)):
        if number == 1:  # the optimizer's state is there
            with slimgrad.Ledger(model, optimizer, inputs=batch) as ledger:
                losses.append(step(model, optimizer, batch))
            row["activation_bytes"] = ledger.columns[Column.ACTIVATIONS]
            row["peak_bytes"] = ledger.peak_bytes
        else:
            losses.append(step(model, optimizer, batch))
    row = {"way": name, "seed": seed, "steps": chosen.num_steps, "lr": way.lr, **row}
    row["head_lr"] = way.head_lr or way.lr
    row["trained_parameters"] = sum(p.numel() for p in parameters)
    row |= {"losses": losses, "accuracy": accuracy(model, chosen.test)}
    print(
        f"{name:7} seed {seed} lr {way.lr:.0e} loss {mean(losses[-LAST:]):.4f} accuracy {row['accuracy']:.2%}",
        flush=True,
    )
    return row


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return round(loss.item(), 5)


def runs(chosen: Task, asked: argparse.Namespace) -> Iterator[Sequence[dict[str, Any]]]:
    rates = [float(lr) for lr in asked.lrs.split(",") if lr]
    for name in asked.ways.split(","):
        for lr in rates or [WAYS[name].lr]:
            for seed in map(int, asked.seeds.split(",")):
                way = replace(WAYS[name], lr=lr, head_lr=asked.head_lr or WAYS[name].head_lr)
                yield [trained(chosen, name, way, seed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lrs", default="")
    parser.add_argument("--head-lr", type=float)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    write_rows(asked.out, runs(task("minilm", asked.steps), asked), KEY)


if __name__ == "__main__":
    main()
