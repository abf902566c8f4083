"""A training job: a model, its optimizer, its loss and its batches, from names on a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from slimgrad.errors import LossError
from slimgrad.training.models import load_model, unloaded_model
from slimgrad.training.text import TokenBlocks, text_source, tokenize


@dataclass(frozen=True)
class JobSpec:
    """What a job is made from: plain values, so that another process can make the same one."""

    model: str = "smollm2"
    data: str | None = None
    seq_len: int = 512
    batch_size: int = 2
    lr: float = 2e-5
    weight_decay: float = 0.01
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """The spec as plain data."""
        return asdict(self)


@dataclass
class Job:
    """A model ready to train. ``batches`` never end; ``loss_fn(model, batch)`` is the mean next-token loss."""

    spec: JobSpec
    name: str
    model: nn.Module
    optimizer: Optimizer
    batches: TokenBlocks


def open_job(spec: JobSpec) -> Job:
    """Load the model and the data, and make the optimizer (AdamW on every parameter)."""
    torch.manual_seed(spec.seed)
    loaded = load_model(spec.model)
    tokens = tokenize(text_source(spec.data), loaded.tokenizer)
    blocks = TokenBlocks(tokens, spec.seq_len, spec.batch_size, spec.seed)
    return Job(spec, loaded.name, loaded.model, adamw(spec, loaded.model), blocks)


def open_fake_job(spec: JobSpec) -> tuple[nn.Module, Optimizer, dict[str, Tensor]]:
    """The job's model, optimizer and a batch on fake tensors: nothing is allocated, no weight is read."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model = unloaded_model(spec.model)
    tokens = torch.zeros(spec.batch_size, spec.seq_len, dtype=torch.long)
    return model, adamw(spec, model), {"input_ids": tokens, "labels": tokens}


def adamw(spec: JobSpec, model: nn.Module) -> Optimizer:
    """The job's optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=spec.lr, weight_decay=spec.weight_decay)


def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean next-token loss: the model's own where it computes one, else from its logits."""
    if hasattr(model, "config"):
        return model(**batch).loss
    out = model(batch["input_ids"])
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise LossError(
            "the model must return logits of shape [batch, tokens, vocabulary] for input_ids of shape "
            f"[batch, tokens], but returned {type(out).__name__}"
        )
    targets = batch["labels"][:, 1:].reshape(-1)
    return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets)
