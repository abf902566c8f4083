"""A block whose saved tensors are few and known, kept as codes, and what the ledger sees of it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from slimgrad import Ledger
from slimgrad.host import Host
from slimgrad.method import Block, CodingCost, Offer, Record, Scope
from slimgrad.methods.activations.coded_store import CodedStore
from slimgrad.methods.activations.selective_recompute import SelectiveRecompute
from slimgrad.planning.profiling import measure
from slimgrad.planning.settings import block_record, layout_of, model_record
from slimgrad.types import Column

NUM_ROWS, WIDTH, HIDDEN, NUM_BLOCKS = 512, 32, 64, 4
UP = NUM_ROWS * HIDDEN  # elements of the hidden layer before, and after, its activation function
NORMED = NUM_ROWS * WIDTH


class Mlp(nn.Module):
    """Saves for backward: the norm's output, two numbers a row, and the hidden layer before and after GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x_ND: Tensor) -> Tensor:
        return x_ND + self.down(functional.gelu(self.up(self.norm(x_ND))))


def mean_square(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss."""
    return model(batch).square().mean()


def made() -> tuple[nn.Module, Tensor]:
    """Equal blocks and a batch ``[NUM_ROWS, WIDTH]``."""
    torch.manual_seed(0)
    return nn.Sequential(*(Mlp() for _ in range(NUM_BLOCKS))), torch.randn(NUM_ROWS, WIDTH)


@functools.cache
def record() -> Record:
    """The record of a block between others, without what codes cost."""
    model, batch = made()
    profile = measure(model, None, mean_square, batch, limit_s=0.0, allow_compile=False)
    layout = layout_of(profile, profile.variants[()])
    return block_record(profile, layout, layout.blocks["1"], model=model_record(profile, 1, None))


def attached(model: nn.Module, setting: CodedStore | None) -> CodedStore | None:
    """``setting`` on what it suits of every block, nothing run again; the store on one block."""
    graph = record().graph
    assert graph is not None
    host, store = Host(model, None, mean_square), setting and setting.on(record())
    schedule = SelectiveRecompute(graph.saved)
    for path in map(str, range(NUM_BLOCKS)):
        for method in (store, schedule) if store else (schedule,):
            method.attach(Block(path, Scope.BLOCK, host=host))
    return store


def held_bytes(setting: CodedStore | None) -> int:
    """The ledger's activations between forward and backward."""
    model, batch = made()
    attached(model, setting)
    with Ledger(model) as ledger:
        loss = mean_square(model, batch)
    held = int(ledger.timeline.columns[Column.ACTIVATIONS][-1])
    loss.backward()
    return held


def freed_bytes(setting: CodedStore) -> int:
    """By how much they are fewer with ``setting`` on every block."""
    return held_bytes(None) - held_bytes(setting)


def offered(store: CodedStore) -> Record:
    """The record that ``store`` offers, with costs of a nanosecond an element."""
    costs: Any = {store.setting: CodingCost(1e-9, 1e-9, 1e-6)}
    offer = store.offer(Block("0", Scope.BLOCK, replace(record(), coding=costs)))
    assert isinstance(offer, Offer)
    assert isinstance(offer.record, Record)
    return offer.record


def gradients(setting: CodedStore | None) -> dict[str, Tensor]:
    """Of each parameter and of the batch, with ``setting`` on every block."""
    model, batch = made()
    attached(model, setting)
    batch.requires_grad_()
    mean_square(model, batch).backward()
    tensors = {**dict(model.named_parameters()), "batch": batch}
    return {name: t.grad for name, t in tensors.items() if t.grad is not None}


def assert_only_weights_are_off(setting: CodedStore) -> dict[str, tuple[Tensor, Tensor]]:
    """All gradients but those of linear layers' weights are plain's; of these: name -> theirs and plain's."""
    plain, ours = gradients(None), gradients(setting)
    weights = {name for name in plain if name.endswith(("up.weight", "down.weight"))}
    for name, gradient in plain.items():
        assert torch.equal(ours[name], gradient) is (name not in weights), name
    return {name: (ours[name], plain[name]) for name in weights}
