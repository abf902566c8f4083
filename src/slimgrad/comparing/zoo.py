"""The zoo: the models of the comparison, each with its loss, its batch, its optimizer and its chains of blocks.

A *chain* is a list of block paths that run one after another, each on what the one before it returned and on the
same other arguments: only inside a chain can several blocks share one checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from slimgrad.comparing.images import ResNet, UNet, VisionTransformer
from slimgrad.comparing.sequences import Decoder, DeepStack, EncoderDecoder, RecurrentModel
from slimgrad.errors import LoadError
from slimgrad.measuring.blocks import cut
from slimgrad.training.job import JobSpec, open_job

SIZES = ("small", "normal")


@dataclass
class Subject:
    """A model to train, in training mode and on the CPU, with all that a step of it needs."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batch: Any
    optimizer: Callable[[nn.Module], Optimizer]
    chains: list[list[str]] = field(default_factory=list)
    note: str = ""

    def __post_init__(self) -> None:
        self.model.train()
        if not self.chains:
            self.chains = chains(self.model)

    @property
    def blocks(self) -> list[str]:
        """The paths of all blocks, in order."""
        return [path for chain in self.chains for path in chain]


def chains(model: nn.Module) -> list[list[str]]:
    """The blocks that ``cut`` finds, those of one run together.

    >>> chains(nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head": nn.Linear(2, 2)}))
    [['body.0', 'body.1']]
    """
    found: dict[str, list[str]] = {}
    for path in cut(model):
        found.setdefault(path.rpartition(".")[0], []).append(path)
    return list(found.values())


def check_name(name: str) -> None:
    """Raise ``LoadError`` for a name that no model of the zoo has."""
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise LoadError(f"no model {name!r} to compare on: {hint}Expected some of {', '.join(ZOO)}")


def subject(name: str, size: str = "normal", *, seed: int = 0) -> Subject:
    """The model of that name: the same weights and batch for the same seed.

    ``size`` "normal" fits two CPU cores (a plain step takes around a second; of "deep", which saves 3 GiB, some
    seconds), "small" is for tests. Raises
    ``LoadError`` for an unknown name or size, and where a package that the model comes in is missing.
    """
    check_name(name)
    if size not in SIZES:
        raise LoadError(f"no size {size!r}: expected {' or '.join(SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name](size == "small")


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def _next_word(model: nn.Module, tokens_NT: Tensor) -> Tensor:
    return _mean_loss(model(tokens_NT[:, :-1]), tokens_NT[:, 1:])


def _translated(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    source_NS, target_NT = batch
    return _mean_loss(model(source_NS, target_NT[:, :-1]), target_NT[:, 1:])


def _class_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def _image_of(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return functional.mse_loss(model(batch[0]), batch[1])


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _mean_loss(logits_NTV: Tensor, labels_NT: Tensor) -> Tensor:
    return functional.cross_entropy(logits_NTV.flatten(0, 1), labels_NT.flatten())


def _images(num_samples: int, pixels: int) -> Tensor:
    return torch.randn(num_samples, 3, pixels, pixels)


def _gpt2(small: bool) -> Subject:
    words, width, num_tokens = (96, 32, 16) if small else (50257, 384, 256)
    num_layers, num_heads = (4, 2) if small else (12, 6)
    tokens_NT = torch.randint(0, words, (2 if small else 4, num_tokens + 1))
    if find_spec("transformers") is None:
        model = Decoder(
            vocabulary=words,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_tokens=num_tokens,
        )
        return Subject(
            model, _next_word, tokens_NT, _adamw, note="own decoder: transformers is not installed"
        )
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=words,
        n_positions=num_tokens,
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    tokens_NT = tokens_NT[:, :num_tokens]
    return Subject(
        GPT2LMHeadModel(config), _own_loss, {"input_ids": tokens_NT, "labels": tokens_NT}, _adamw
    )


def _smollm2(small: bool) -> Subject:
    if small:
        return _small_llama()
    job = open_job(JobSpec(seq_len=256, batch_size=2))
    model: Any = job.model
    model.config.use_cache = False
    return Subject(model, _own_loss, next(job.batches), _adamw)


def _small_llama() -> Subject:
    if find_spec("transformers") is None:
        raise LoadError("the small smollm2 is made by transformers: install slimgrad[hf]")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    tokens_NT = torch.randint(0, 128, (2, 32))
    batch = {"input_ids": tokens_NT, "labels": tokens_NT}
    return Subject(LlamaForCausalLM(config), _own_loss, batch, _adamw, note="random Llama")


def _resnet50(small: bool) -> Subject:
    model = ResNet(depths=(1, 2), width=8, num_classes=10) if small else ResNet()
    num_samples, pixels = (4, 32) if small else (8, 128)
    labels = torch.randint(0, 10, (num_samples,))
    return Subject(model, _class_of, [_images(num_samples, pixels), labels], _sgd)


def _vit(small: bool) -> Subject:
    model = (
        VisionTransformer(image=32, patch=8, width=32, num_layers=4, num_heads=2, num_classes=10)
        if small
        else VisionTransformer(image=128, patch=16, width=384, num_layers=12, num_heads=6)
    )
    num_samples, pixels = (4, 32) if small else (16, 128)
    labels = torch.randint(0, 10, (num_samples,))
    return Subject(model, _class_of, [_images(num_samples, pixels), labels], _adamw)


def _t5(small: bool) -> Subject:
    words, width, num_tokens = (96, 32, 16) if small else (16384, 384, 192)
    model = EncoderDecoder(
        vocabulary=words,
        width=width,
        num_layers=2 if small else 6,
        num_heads=2 if small else 6,
        num_tokens=num_tokens,
    )
    source_NS = torch.randint(0, words, (4, num_tokens))
    target_NT = torch.randint(0, words, (4, num_tokens + 1))
    return Subject(model, _translated, [source_NS, target_NT], _adamw)


def _unet(small: bool) -> Subject:
    model = UNet(width=8 if small else 32, num_levels=3 if small else 4)
    num_samples, pixels = (2, 16) if small else (8, 64)
    batch = [_images(num_samples, pixels), _images(num_samples, pixels)]
    alone = [[path] for path in cut(model)]  # between two blocks the image is resized, and kept
    return Subject(model, _image_of, batch, _adamw, chains=alone)


def _lstm(small: bool) -> Subject:
    words, width = (96, 24) if small else (16384, 384)
    model = RecurrentModel(vocabulary=words, width=width, num_layers=3)
    tokens_NT = torch.randint(0, words, (4, 17) if small else (16, 129))
    return Subject(model, _next_word, tokens_NT, _adamw)


def _deep(small: bool) -> Subject:
    num_samples, width, num_layers = (32, 16, 12) if small else (1024, 256, 1000)
    model = DeepStack(width=width, num_layers=num_layers, num_classes=10)
    batch = [torch.randn(num_samples, width), torch.randint(0, 10, (num_samples,))]
    return Subject(model, _class_of, batch, _sgd)


ZOO: dict[str, Callable[[bool], Subject]] = {
    "gpt2": _gpt2,
    "smollm2": _smollm2,
    "resnet50": _resnet50,
    "vit": _vit,
    "t5": _t5,
    "unet": _unet,
    "lstm": _lstm,
    "deep": _deep,
}
"""Makers by name; each is told whether the small size is wanted."""
