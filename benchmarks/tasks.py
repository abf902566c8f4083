"""What models learn in ``finetuning.py`` and ``topics.py``: digits from scratch, topics and next tokens pretrained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimgrad.training.models import load_model
from slimgrad.training.text import TokenBlocks, text_source, tokenize

NUM_TOPICS, NUM_TOKENS = 8, 32
WINDOW = 64  # tokens of the language model

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


class NextToken(nn.Module):
    """A causal language model whose classes are its tokens, ``[N, T] -> [N, num_tokens, T]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits.transpose(1, 2)


def next_tokens(tokenizer: Any) -> tuple[Batch, Batch]:
    """Windows of tokens of Python's documentation, and of each token the one after it."""
    windows = TokenBlocks(tokenize(text_source(), tokenizer), WINDOW + 1, 1).blocks.long()
    return _split(windows[:, :-1], windows[:, 1:])


def task(name: str, num_steps: int) -> Task:
    """The task of this name."""
    if name == "smollm2":
        loaded = load_model("smollm2")
        make = lambda: NextToken(copy.deepcopy(loaded.model))  # noqa: E731
        return Task(name, make, *next_tokens(loaded.tokenizer), 1, num_steps or 30, 5e-5)
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


def fresh(chosen: Task, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return chosen.model().train()
