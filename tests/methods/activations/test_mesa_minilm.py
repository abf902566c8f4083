"""Codes in 8 bits on a pretrained encoder: the forward pass is plain's, a quarter of the bytes, and the gradient's error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad import Ledger, measure
from slimgrad.errors import LoadError
from slimgrad.host import Host
from slimgrad.method import Block, Record, Scope
from slimgrad.methods.activations.mesa import Mesa
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.training.models import load_model
from slimgrad.training.text import text_source
from slimgrad.types import Column
from slimgrad.verifying.gradient import relative_error

SAMPLES, TOKENS, TOPICS = 8, 32, 4


class Classifier(nn.Module):
    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, TOPICS)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Any, dict[str, Record]]:
    pytest.importorskip("transformers")
    try:
        loaded = load_model("minilm")
    except LoadError as error:
        pytest.skip(str(error))
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
    texts = text_source().documents[:SAMPLES]
    tokens = loaded.tokenizer(texts, return_tensors="pt", **options)["input_ids"]
    torch.manual_seed(0)
    model = Classifier(loaded.model, loaded.model.config.hidden_size).train()
    batch = tokens, torch.arange(SAMPLES) % TOPICS
    profile = measure(model, None, loss_of, batch, limit_s=0.0, allow_compile=False)
    layout, step = layout_of(profile, profile.variants[()]), model_record(profile, 1, None)
    found = {p: block_record(profile, layout, b, model=step) for p, b in layout.blocks.items()}
    return model, batch, found


def step_of(
    case: tuple[nn.Module, Any, dict[str, Record]], store: Mesa | None
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients and the bytes kept between forward and backward, with ``store`` on every block."""
    model, batch, records = case
    host, undo = Host(model, None, loss_of), []
    for path, record in records.items():
        assert record.graph is not None
        chosen = (store.on(record),) if store else ()
        for method in (*chosen, SelectiveRecompute(record.graph.saved)):
            undo.append(method.attach(Block(path, Scope.BLOCK, host=host)))
    torch.manual_seed(0)
    with Ledger(model, inputs=batch) as ledger:
        loss = loss_of(model, batch)
    held = int(ledger.timeline.columns[Column.ACTIVATIONS][-1])
    loss.backward()
    for each in reversed(undo):
        each()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, held


@pytest.mark.slow
def test_minilm_within_five_percent_and_nearer_by_groups_than_by_layers(case: Any) -> None:
    exact_loss, exact, plain = step_of(case, None)
    errors = {}
    for size in (0, Mesa().group_size):
        store = Mesa(group_size=size)
        loss, found, held = step_of(case, store)
        assert torch.equal(loss, exact_loss)
        covered = sum(
            record.graph.num_bytes[s]
            for record in case[2].values()
            for s in store.on(record).storages
        )
        assert 0.73 * covered < plain - held <= 0.75 * covered
        errors[size] = relative_error(found, exact)
    print("gradient error by size of group:", errors)
    assert errors[32] < 0.7 * errors[0]
    assert errors[32] < 0.05
