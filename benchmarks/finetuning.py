"""What training loses when every block keeps its activations as codes: loss and accuracy beside exact training's.

    python benchmarks/finetuning.py [--tasks vit,cnn,minilm] [--seeds 3] [--steps 0] [--stores mesa,few_bit]

``vit`` and ``cnn`` learn the handwritten digits of scikit-learn from scratch, ``minilm`` is fine-tuned, every
parameter, to tell from 32 tokens which of eight topics of Python's documentation they are of. For each setting of each
store and each seed: initial weights, order of batches and random draws are exact training's; what the store suits is
kept as codes in every block. Written down: the loss of every step, the accuracy on what was not trained on, the bytes
of the ledger's activations, the relative L2 error of the first gradient, and what ``measure(sensitivity=True)`` says
that it would be. Rows of other tasks, stores, settings and seeds stay in the file.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimgrad
from rows import write_rows
from slimgrad.host import Host
from slimgrad.method import Block, Offer, Scope, Setting, Undo
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.training.models import load_model
from slimgrad.verifying.gradient import captured_gradients, relative_error

RESULTS = Path(__file__).parent / "results" / "finetuning.jsonl"
NUM_TOPICS, NUM_TOKENS = 8, 32
LAST = 10  # steps whose loss is averaged as the final one

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Task:
    """What is learned: a fresh model, samples to learn from and to be tested on (features, labels)."""

    name: str
    model: Callable[[], nn.Module]
    train: Batch
    test: Batch
    batch_size: int
    num_steps: int
    lr: float


class DigitsViT(nn.Module):
    """A small vision transformer on 8x8 images in patches of 2x2."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        block = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, **block) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ResidualConvolutions(nn.Module):
    """Two convolutions with GELU between, added to what goes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.body(x)


def digits_cnn(width: int = 32, depth: int = 3) -> nn.Module:
    """A small residual network on 8x8 images."""
    blocks = [ResidualConvolutions(width) for _ in range(depth)]
    pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), *blocks, *pooled)


class Classifier(nn.Module):
    """A pretrained encoder, the mean of its last hidden states, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


def digits() -> tuple[Batch, Batch]:
    """The digits, every fifth for the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    return _split(images, torch.tensor(found.target))


def topics(tokenizer: Any) -> tuple[Batch, Batch]:
    """Windows of tokens of the longest topics of Python's documentation, and which topic each is of."""
    from pydoc_data.topics import topics as found

    longest = sorted(found.values(), key=len)[-NUM_TOPICS:]
    windows, labels = list[Tensor](), list[int]()
    for label, text in enumerate(longest):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows = torch.tensor(tokens).split(NUM_TOKENS)[:-1]
        windows += rows
        labels += [label] * len(rows)
    return _split(torch.stack(windows), torch.tensor(labels))


def _split(features: Tensor, labels: Tensor) -> tuple[Batch, Batch]:
    is_test = torch.arange(len(labels)) % 5 == 0
    return (features[~is_test], labels[~is_test]), (features[is_test], labels[is_test])


def task(name: str, num_steps: int) -> Task:
    """The task of this name."""
    if name == "minilm":
        loaded = load_model("minilm")
        encoder, width = loaded.model, loaded.model.config.hidden_size
        make = lambda: Classifier(copy.deepcopy(encoder), width, NUM_TOPICS)  # noqa: E731
        return Task(name, make, *topics(loaded.tokenizer), 8, num_steps or 80, 2e-4)
    make = DigitsViT if name == "vit" else digits_cnn
    return Task(name, make, *digits(), 64, num_steps or 160, 1e-3)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(chosen: Task, seed: int) -> Iterator[Batch]:
    """So many batches of the task, in the seed's order."""
    generator, (features, labels) = torch.Generator().manual_seed(seed), chosen.train
    order = torch.cat(
        [torch.randperm(len(labels), generator=generator) for _ in range(1 + chosen.num_steps)]
    )
    for picked in order.split(chosen.batch_size)[: chosen.num_steps]:
        yield features[picked], labels[picked]


@dataclass
class Coded:
    """One setting on every block that it suits: what is attached where, and the error that was measured for all."""

    stores: dict[str, tuple[CodedStore, SelectiveRecompute]]
    squared_error: float = 0.0


def coded_settings(profile: slimgrad.Profile) -> dict[Setting, Coded]:
    """Each setting that was measured, on all blocks."""
    layout, model = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    found: dict[Setting, Coded] = {}
    for path, block in layout.blocks.items():
        record = block_record(profile, layout, block, model=model)
        for name, fields in record.coding:
            asked = Block(path, Scope.BLOCK, record)
            store = slimgrad.catalogue.get(name, **dict(fields)).on(record)
            offer = store.offer(asked)
            if not isinstance(offer, Offer):
                continue
            coded = found.setdefault((name, fields), Coded({}))
            coded.stores[path] = store, SelectiveRecompute(record.graph.saved)
            coded.squared_error += offer.record.squared_error
    return found


def attached(model: nn.Module, coded: Coded) -> Undo:
    """The setting attached to every block."""
    host, undo = Host(model, None, loss_of), Undo(lambda: None)
    for path, methods in coded.stores.items():
        block = Block(path, Scope.BLOCK, host=host)
        for method in methods:
            undo.then(method.attach(block))
    return undo


def fresh(chosen: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return chosen.model().train()


def first_gradient(chosen: Task, coded: Coded | None) -> tuple[dict[str, Tensor], int]:
    """The first batch's gradient and the most bytes of activations on the way."""
    model, batch = fresh(chosen, 0), next(batches(chosen, 0))
    undo = attached(model, coded) if coded is not None else None
    found: dict[str, Tensor] = {}
    torch.manual_seed(0)
    with captured_gradients(model, found), slimgrad.Ledger(model, inputs=batch) as ledger:
        loss_of(model, batch).backward()
    if undo is not None:
        undo()
    return found, int(max(ledger.timeline.columns["activations"]))


def trained(chosen: Task, seed: int, coded: Coded | None) -> tuple[list[float], float]:
    """The loss of every step and the accuracy at the end."""
    model = fresh(chosen, seed)
    undo = attached(model, coded) if coded is not None else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.lr)
    losses: list[float] = []
    for batch in batches(chosen, seed):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    if undo is not None:
        undo()
    features, labels = chosen.test
    with torch.no_grad():
        answers = [model.eval()(part).argmax(1) for part in features.split(64)]
    return losses, float((torch.cat(answers) == labels).float().mean())


def rows_of(chosen: Task, stores: set[str], num_seeds: int) -> Iterator[Mapping[str, Any]]:
    """Exact training's rows, then a row for each setting and seed."""
    model, batch = fresh(chosen, 0), next(batches(chosen, 0))
    profile = slimgrad.measure(model, None, loss_of, batch, allow_compile=False, sensitivity=True)
    exact, plain_bytes = first_gradient(chosen, None)
    settings: dict[Setting | None, Coded | None] = {None: None}
    settings |= {s: c for s, c in coded_settings(profile).items() if not stores or s[0] in stores}
    for setting, coded in settings.items():
        gradient, num_bytes = first_gradient(chosen, coded)
        row: dict[str, Any] = {
            "model": chosen.name,
            "store": setting[0] if setting else "exact",
            "setting": dict(setting[1]) if setting else {},
            "activation_ratio": num_bytes / plain_bytes,
            "gradient_error": relative_error(gradient, exact),
            "predicted_error": coded.squared_error**0.5 if coded else 0.0,
        }
        ended, right = list[float](), list[float]()
        for seed in range(num_seeds):
            losses, accuracy = trained(chosen, seed, coded)
            ended.append(mean(losses[-LAST:]))
            right.append(accuracy)
            yield {**row, "seed": seed, "losses": losses, "accuracy": accuracy}
        told = " ".join(f"{k}={v}" for k, v in row["setting"].items())
        print(
            f"{chosen.name:7} {row['store']:17} {told:26} activations {row['activation_ratio']:.3f} gradient "
            f"{row['gradient_error']:.4f} (measured before {row['predicted_error']:.4f}) "
            + (f"loss {mean(ended):.4f} accuracy {mean(right):.2%}" if ended else ""),
            flush=True,
        )
        if not num_seeds:
            yield row


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
    rows = (row for chosen in tasks for row in rows_of(chosen, stores, asked.seeds))
    write_rows(asked.out, ([row] for row in rows), key=("model", "store", "setting", "seed"))


if __name__ == "__main__":
    main()
