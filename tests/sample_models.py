"""The models that the batteries run on: small, quick, and each with something that has broken tools like ours.

A ``Sample`` makes a fresh (model, loss_fn, batch), the same one every time. Shapes: N samples, T tokens, D
features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Made = tuple[nn.Module, Callable[[nn.Module, Any], Tensor], Any]


@dataclass(frozen=True)
class Sample:
    """One model of the battery. ``make`` gives it in training mode, with its loss function and a batch."""

    name: str
    make: Callable[[], Made]


SAMPLES: dict[str, Sample] = {}


def _sample(make: Callable[[], Made]) -> Callable[[], Made]:
    @functools.wraps(make)
    def seeded() -> Made:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model, loss_fn, batch = make()
        return model.train(), loss_fn, batch

    SAMPLES[make.__name__] = Sample(make.__name__, seeded)
    return seeded


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the battery, over every parameter (frozen ones too, as users pass them)."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a classifier on (inputs, labels)."""
    return functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def hugging_face_loss(model: nn.Module, batch: Any) -> Tensor:
    """What users of Hugging Face models write."""
    return model(**batch).loss


def _labelled(x: Tensor, num_classes: int = 10) -> tuple[Tensor, Tensor]:
    """Inputs with a label a sample (images) or a token (N, T, D)."""
    return x, torch.randint(0, num_classes, x.shape[:2] if x.dim() == 3 else x.shape[:1])


# -- plain modules -----------------------------------------------------------------------------------


@_sample
def mlp() -> Made:
    """Four equal blocks of two layers, and a head."""
    blocks = [nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(4)]
    model = nn.Sequential(*blocks, nn.Linear(48, 10))
    return model, cross_entropy, _labelled(torch.randn(4, 16, 48))


@_sample
def conv_batchnorm() -> Made:
    """Convolutions with batch norm, whose statistics are updated in forward."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 8), (8, 8), (8, 16)):
        layers.append(
            nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU())
        )
    head = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))
    model = nn.Sequential(*layers, head)
    return model, cross_entropy, _labelled(torch.randn(8, 3, 8, 8))


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(2, channels),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


@_sample
def residual_conv() -> Made:
    """A residual stack: every block's input lives on in its output's sum."""
    stack = nn.Sequential(*(_Residual(12) for _ in range(5)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10))
    model = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), stack, head)
    return model, cross_entropy, _labelled(torch.randn(4, 3, 12, 12))


@_sample
def attention() -> Made:
    """Attention blocks with dropout: random masks must be drawn again as they were."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.ModuleDict({"embed": nn.Embedding(50, 32), "body": body, "head": nn.Linear(32, 50)})

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        logits = model["head"](model["body"](model["embed"](batch[:, :-1])))
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return model, loss_fn, torch.randint(0, 50, (2, 25))


class _LstmModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.lstm = nn.LSTM(24, 32, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(32, 60)

    def forward(self, x_NT: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x_NT))[0])


@_sample
def lstm() -> Made:
    """A flat model: an LSTM has no run of blocks to cut."""

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch["x"]).transpose(1, 2), batch["targets"])

    words = torch.randint(0, 60, (8, 17))
    return _LstmModel(), loss_fn, {"x": words[:, :-1], "targets": words[:, 1:]}


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 24)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))
            for _ in range(3)
        )
        self.head = nn.Linear(24, 80, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x_NT: Tensor) -> Tensor:
        h_NTD = self.embed(x_NT)
        for block in self.blocks:
            h_NTD = h_NTD + block(h_NTD)
        return self.head(h_NTD)


@_sample
def tied() -> Made:
    """One weight used at both ends: its gradient is complete only after the embedding's backward."""

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return functional.cross_entropy(model(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    return _Tied(), loss_fn, torch.randint(0, 80, (6, 17))


@_sample
def frozen_layer() -> Made:
    """Two of five blocks frozen, the first among them: its output needs no gradient."""
    blocks = (nn.Sequential(nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 40)) for _ in range(5))
    model = nn.Sequential(*blocks)
    for index in (0, 2):
        model[index].requires_grad_(False)
    return model, cross_entropy, _labelled(torch.randn(4, 12, 40), 40)


class _SharedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 32)) for _ in range(3)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x_ND: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x_ND = x_ND + block(x_ND)
        return self.head(x_ND)


@_sample
def shared_twice() -> Made:
    """Every block is called twice a step, in turn: a block is a call, not a module."""
    return _SharedTwice(), cross_entropy, _labelled(torch.randn(2, 20, 32))


@_sample
def in_place() -> Made:
    """Activations that overwrite what a layer returned."""
    blocks = [
        nn.Sequential(nn.Linear(40, 80), nn.ReLU(inplace=True), nn.Linear(80, 40)) for _ in range(4)
    ]
    return nn.Sequential(*blocks), cross_entropy, _labelled(torch.randn(4, 12, 40), 40)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(36, 72), nn.Linear(72, 36)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(36))

    def forward(self, x_ND: Tensor) -> Tensor:
        with torch.no_grad():
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x_ND.mean(
                (0, 1)
            )  # a new tensor in the buffer's place
        return self.out(torch.tanh(self.layer(x_ND - self.mean))) / self.calls.sqrt()


@_sample
def counting_buffer() -> Made:
    """Forward passes that read and write buffers, in place and by assignment."""
    return (
        nn.Sequential(*(_Counting() for _ in range(3))),
        cross_entropy,
        _labelled(torch.randn(4, 10, 36), 36),
    )


@_sample
def non_contiguous() -> Made:
    """A list of transposed and strided views for a batch."""
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3))
    )

    def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return (
        model,
        loss_fn,
        [torch.randn(10, 4, 32).transpose(0, 1), torch.randn(4, 10, 64)[..., ::2]],
    )


@_sample
def autocast() -> Made:
    """Mixed precision inside the loss function."""
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(3))
    )

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return cross_entropy(model, batch)

    return model, loss_fn, _labelled(torch.randn(4, 16, 48), 48)


# -- Hugging Face ------------------------------------------------------------------------------------


@_sample
def gpt2() -> Made:
    """GPT-2 with its default dropout of 0.1, and a BatchEncoding with a padded sample for a batch.

    Without padding Hugging Face's code looks at the mask's values and leaves it out, which fake tensors cannot.
    """
    from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    words, mask = torch.randint(0, 96, (2, 32)), torch.ones(2, 32, dtype=torch.int64)
    mask[:, 28:] = 0
    labels = words.masked_fill(mask == 0, -100)
    batch = BatchEncoding({"input_ids": words, "attention_mask": mask, "labels": labels})
    return GPT2LMHeadModel(config), hugging_face_loss, batch


@_sample
def llama() -> Made:
    """A Llama with tied embeddings, grouped queries and its key-value cache left on, as by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    words = torch.randint(0, 128, (2, 32))
    return LlamaForCausalLM(config), hugging_face_loss, {"input_ids": words, "labels": words}
